"""The sum of gradients of a run without privacy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.contributions import checked_mask, without_unusable
from dpcap.privacy.clipping.rounding import at_least_float32
from dpcap.privacy.clipping.strategy import ClippedSum, LossFn
from dpcap.privacy.clipping.tracing import trace_loss

PyTree = Any


def plain_sum(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  mask: jax.Array | None = None,
) -> ClippedSum:
  """Sum over a batch of gradients, NOT clipped: unbounded sensitivity, no guarantee.

  The non-private counterpart of `clipped_sum`, by one batched backward pass, for runs
  with epsilon = infinity. Same arguments. An example whose gradient is not finite contributes
  zero, and its factor is 0; so does a batch whose sum alone overflows. `norms` are NaN: they
  are not computed.
  """
  batch = jax.tree.map(jnp.asarray, batch)
  mask = checked_mask(mask, batch)
  trace_loss(loss_fn, params, batch)

  def attempt(batch, mask) -> ClippedSum:
    def total_loss(params):
      losses = jax.vmap(loss_fn, (None, 0))(params, batch)
      return jnp.sum(jnp.where(mask, losses, 0.0)), losses

    grads, losses = jax.grad(total_loss, has_aux=True)(params)
    grads = jax.tree.map(at_least_float32, grads)

    def look_at_each(_):
      one = lambda example: _is_finite(jax.grad(loss_fn)(params, example))
      return jax.lax.map(one, batch)

    # Rare, and then one by one.
    finite = _is_finite(grads)
    usable = jax.lax.cond(finite, lambda _: jnp.ones(mask.shape, bool), look_at_each, None)
    return ClippedSum(
      # Where each is finite and the sum is not, it is zero.
      sum=jax.tree.map(lambda g: jnp.where(finite, g, 0), grads),
      norms=jnp.where(usable, 0.0, jnp.nan),
      factors=jnp.where(mask, 1.0, 0.0),
      losses=losses,
    )

  result = without_unusable(attempt, batch, mask) if mask.size else attempt(batch, mask)
  return result._replace(norms=jnp.full(mask.shape, jnp.nan))


def _is_finite(tree: PyTree) -> jax.Array:
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, finite, jnp.array(True))
