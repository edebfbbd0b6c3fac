"""What strategies share: sums of weighted gradients, and examples that cannot be used."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.rounding import at_least_float32
from dpcap.privacy.clipping.strategy import ClippedSum

PyTree = Any


def weighted_sum(weights_B: jax.Array, grads_B: jax.Array) -> jax.Array:
  """sum_b weights_b grads_b of gradients that are formed, in at least float32."""
  return jnp.einsum('b,b...->...', weights_B, at_least_float32(grads_B), precision='highest')


def add_term(sums: dict[int, jax.Array], leaf: int, term: jax.Array) -> None:
  """Adds to the sum of a parameter, or starts it."""
  sums[leaf] = sums[leaf] + term if leaf in sums else term


def unflattened(treedef, leaves: list[jax.Array], sums: dict[int, jax.Array]) -> PyTree:
  """The parameters' tree of sums by leaf; zeros for parameters without a gradient."""
  zeros = lambda leaf: jnp.zeros_like(at_least_float32(jnp.asarray(leaf)))
  return treedef.unflatten([sums[i] if i in sums else zeros(x) for i, x in enumerate(leaves)])


def repeated(x: jax.Array, size: int) -> jax.Array:
  """`x` with a new axis of `size` in front."""
  return jnp.broadcast_to(x, (size, *jnp.shape(x)))


def checked_mask(mask: jax.Array | None, batch: PyTree) -> jax.Array:
  """`mask`, or all True; a ValueError for one that does not fit the batch, where JAX gives none."""
  sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(f'batch has leading axes {sorted(sizes)}; all leaves need the same one')
  (shape,) = sizes
  mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
  if (mask.shape, mask.dtype) != (shape, bool):
    raise ValueError(f'mask is {mask.dtype} {mask.shape}; it must be bool {shape}')
  return mask


def _stand_in(batch: PyTree, mask: jax.Array) -> PyTree:
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
    out = attempt(_stand_in(batch, mask), mask)
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
