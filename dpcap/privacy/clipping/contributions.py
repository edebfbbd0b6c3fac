"""What a physical batch contributes to the logical one, and what all strategies share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.rounding import at_least_float32

PyTree = Any


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


def weighted(weights_B: jax.Array, grads_B: jax.Array) -> jax.Array:
  """sum_b weights_b grads_b, in at least float32."""
  return jnp.einsum('b,b...->...', weights_B, at_least_float32(grads_B), precision='highest')


def unflattened(treedef, leaves: list[jax.Array], sums: dict[int, jax.Array]) -> PyTree:
  """The parameters' tree of sums by leaf; zeros for parameters without a gradient."""
  zeros = lambda leaf: jnp.zeros_like(at_least_float32(jnp.asarray(leaf)))
  return treedef.unflatten([sums[i] if i in sums else zeros(x) for i, x in enumerate(leaves)])


def repeated(x: jax.Array, size: int) -> jax.Array:
  """`x` with a new axis of `size` in front."""
  return jnp.broadcast_to(x, (size, *jnp.shape(x)))


def stand_in(batch: PyTree, mask: jax.Array) -> PyTree:
  """The batch with the first example that counts in place of all that do not.

  A masked example may hold anything, and a zero weight does not silence a NaN.
  """
  chosen = jnp.where(mask, jnp.arange(mask.shape[0]), jnp.argmax(mask))
  return jax.tree.map(lambda x: x[chosen], batch)


def without_unusable(
  attempt: Callable[[PyTree, jax.Array], ClippedSum], batch: PyTree, mask: jax.Array
) -> ClippedSum:
  """`attempt(batch, mask)`, again without the examples whose gradient proves unusable.

  So they contribute exactly zero, and what they hold touches nothing else: to sum with
  them, even at weight zero, would spread their NaNs. Every further attempt is rare and
  masks at least one example more.
  """

  def try_once(state):
    result, mask, _ = state
    out = attempt(stand_in(batch, mask), mask)
    usable = mask & jnp.isfinite(out.norms)
    first = lambda new, old: jnp.where(mask, new, old)
    result = ClippedSum(
      # Where no example is left, the stand-in may be anything.
      sum=jax.tree.map(lambda x: jnp.where(jnp.any(usable), x, 0), out.sum),
      norms=first(out.norms, result.norms),
      factors=jnp.where(usable, out.factors, 0),
      losses=first(out.losses, result.losses),
    )
    return result, usable, jnp.any(usable != mask)

  attempt = jax.jit(attempt)  # traced once for its shapes and for the loop
  shapes = jax.eval_shape(attempt, batch, mask)
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  state = (nothing, mask, jnp.array(True))
  return jax.lax.while_loop(lambda state: state[2], try_once, state)[0]
