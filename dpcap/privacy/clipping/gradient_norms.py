"""The norm of an example's whole gradient, from what is known of its parts.

No entry is in two parts. So squares add up: of norms, of their errors and, by (3) of `norms.py`
and Minkowski's inequality, of what rounding adds. Parts that are each off by at most
w sqrt(rounding_i) + flushed_i are together off by at most

  w sqrt(sum_i rounding_i) + sum_i flushed_i.

Of a gradient that is formed, each weighed entry below TINY may become 0, and is else rounded once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.norms import SquaredNorm
from dpcap.privacy.clipping.rounding import TINY, gamma, sum_in_pairs, sum_of_squares, tree_depth

# How much of what rounding may add `gradient_norms` leaves uncounted. The rest of ROUNDING_MARGIN
# is for sums of squares whose terms meet up to 50 roundings, and a few roundings of a norm, its
# factor and the weighted gradient.
_UNCOUNTED = 8e-6

# Entries of a parameter whose gradients are copied without a thought.
_SMALL = 4096


class GradientNorms(NamedTuple):
  """Of the whole gradient of each example; (B,) each.

  Attributes:
    value: as computed.
    bound: weight * bound + flushed is at least the norm of what a gradient of any weight > 0 adds
      to a sum, but for _UNCOUNTED of it. Finite where `value` is.
    flushed: what numbers below TINY may add, whatever the weight.
  """

  value: jax.Array
  bound: jax.Array
  flushed: jax.Array


def gradient_norms(
  size: int, formed: Sequence[jax.Array], unformed: Sequence[SquaredNorm]
) -> GradientNorms:
  """Of whole gradients, from their parts.

  Args:
    size: B.
    formed: per-example gradients (B, ...), summed as they are.
    unformed: of parts that were never formed.
  """
  formed = _with_small_ones_joined(formed)
  squares = sum_in_pairs([jnp.zeros(size, jnp.float32), *map(sum_of_squares, formed)])
  # Squares below the smallest number may be lost, and weighted entries.
  entries = sum(g.size // size for g in formed)
  lost, flushed = TINY * entries, TINY * math.sqrt(entries)
  if not unformed:
    flushed = jnp.full(size, flushed, squares.dtype)
    return GradientNorms(jnp.sqrt(squares), jnp.sqrt(squares + lost), flushed)
  others = SquaredNorm(*(sum_in_pairs(list(terms)) for terms in zip(*unformed, strict=True)))
  # Each square meets the additions of its tree, then those of parameters.
  depth = tree_depth(max((g.size // size for g in formed), default=1))
  error = gamma(1 + depth + len(formed).bit_length() + 2, squares.dtype) * squares
  # A Gram sum may fall below zero by rounding.
  value = jnp.sqrt(jnp.maximum(others.value, 0) + squares)
  square_bound = jnp.maximum(others.value + (others.error + error), 0) + squares + lost
  bound = jnp.sqrt(square_bound) + jnp.sqrt(others.rounding)
  bound = jnp.maximum(value, bound * (1 - _UNCOUNTED))
  # Neither is finite where the other is not.
  value = jnp.where(jnp.isfinite(bound), value, bound)
  return GradientNorms(value, bound, others.flushed + flushed)


def _with_small_ones_joined(arrays_B: Sequence[jax.Array]) -> list[jax.Array]:
  """The same entries of (B, ...) arrays in fewer arrays.

  A network has hundreds of biases, and a sum for each takes long to compile.
  """
  flat = [g.reshape(len(g), math.prod(g.shape[1:])) for g in arrays_B]
  small = [g for g in flat if g.shape[1] <= _SMALL]
  large = [g for g in flat if g.shape[1] > _SMALL]
  return large + ([jnp.concatenate(small, axis=1)] if small else [])
