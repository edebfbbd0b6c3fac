"""Clipping by gradients of single examples: the definition of right.

Source: Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133, algorithm 1.
"""

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.computed_once import settled
from dpcap.privacy.clipping.contributions import weighted_sum
from dpcap.privacy.clipping.gradient_norms import gradient_norms
from dpcap.privacy.clipping.rounding import at_least_float32
from dpcap.privacy.clipping.strategy import ClippedSum, Problem


def vmap(problem: Problem) -> ClippedSum:
  """The clipped sum, from the whole gradient of every example, by jax.vmap of jax.grad."""
  gradient = jax.vmap(jax.value_and_grad(problem.loss_fn), (None, 0))
  losses, grads = gradient(problem.params, problem.batch)
  # Norm and sum are of the same numbers. Of a loss that is constant the gradient need not be.
  grads = jax.tree.map(at_least_float32, grads)
  grads = settled(grads, (grads, losses))

  mask = problem.mask
  norms = gradient_norms(mask.size, jax.tree.leaves(grads), [])
  factors = jnp.where(mask & jnp.isfinite(norms.value), problem.factor_of(norms), 0.0)

  def clipped(g_B):
    # 0 x NaN is NaN: a zero factor does not silence an unusable gradient, `where` does.
    used = (factors > 0).reshape(factors.shape + (1,) * (g_B.ndim - 1))
    return weighted_sum(factors, jnp.where(used, g_B, 0.0))

  return ClippedSum(
    sum=jax.tree.map(clipped, grads),
    norms=jnp.where(mask, norms.value, 0.0),
    factors=factors,
    losses=jnp.where(mask, losses, 0.0),
  )
