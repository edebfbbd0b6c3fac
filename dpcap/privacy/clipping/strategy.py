"""What a strategy of clipping is given, and what it gives back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from dpcap.privacy.clipping.gradient_norms import GradientNorms
from dpcap.privacy.clipping.uses import Uses, find_uses

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A clipped sum to compute.

  Attributes:
    loss_fn: of one example.
    trace: of `loss_fn`, by `tracing.trace_loss`.
    params: the trained parameters.
    batch: one example or more.
    mask: (B,) bool.
    factor_of: from norms (B,) to factors (B,), finite and >= 0.
  """

  loss_fn: LossFn
  trace: core.ClosedJaxpr
  params: PyTree
  batch: PyTree
  mask: jax.Array
  factor_of: Callable[[GradientNorms], jax.Array]

  @functools.cached_property
  def uses(self) -> Uses:
    """What the trace does with the parameters; warns where that is costly."""
    return find_uses(self.trace, self.params)


class ClippedSum(NamedTuple):
  """What a physical batch adds to the logical batch.

  Attributes:
    sum: like the trained parameters, at least float32: the sum of clipped gradients.
    norms: (B,) gradient norm of each example before clipping; 0 where masked out,
      NaN or inf where the gradient was unusable and contributed zero. Private.
    factors: (B,) what each gradient was scaled by; 0 where masked out or unusable. Private.
    losses: (B,) loss of each example; 0 where masked out. Private.
  """

  sum: PyTree
  norms: jax.Array
  factors: jax.Array
  losses: jax.Array


Strategy = Callable[[Problem], ClippedSum]
