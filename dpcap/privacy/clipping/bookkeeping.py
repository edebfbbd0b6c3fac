"""Clipping by one backward pass that keeps what norms and sums are made of.

For each site that is its activations, which the forward pass records, and its output's gradients,
which the backward pass leaves in a slot: an input of zeros beside the output (`tap`), whose
gradient is the output's. The gradient of the parameter itself is never asked for.

Source: Bu et al. 2022, Differentially Private Optimization on Large Model at Small Cost, arXiv
2210.00038, algorithm 1.
"""

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.contributions import repeated, unflattened, without_unusable
from dpcap.privacy.clipping.gradient_norms import gradient_norms
from dpcap.privacy.clipping.kept_sites import keep_sites
from dpcap.privacy.clipping.replay import replay
from dpcap.privacy.clipping.sites import Path, Site
from dpcap.privacy.clipping.strategy import ClippedSum, Problem


def bookkeeping(problem: Problem) -> ClippedSum:
  """The clipped sum, from one forward and one backward pass of the batch."""
  uses = problem.uses
  leaves, treedef = jax.tree.flatten(problem.params)

  def at_site(site, x, w, slot):
    return tap(site.apply(x, w), slot), x

  def loss_of_one(direct, slots, example):
    mixed = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
    return replay(uses, mixed, example, slots, at_site)

  axes = batch_axes(uses.sites)
  losses_of = jax.vmap(loss_of_one, (0, axes, 0), (0, axes))

  def attempt(batch, mask) -> ClippedSum:
    size = mask.shape[0]

    # Forward and backward: the gradients of slots are those of the sites' outputs.
    direct = {i: repeated(leaves[i], size) for i in uses.direct}
    slots = {at: make_slot(site, size) for at, site in uses.sites.items()}
    losses, backward, xs = jax.vjp(
      lambda direct, slots: losses_of(direct, slots, batch), direct, slots, has_aux=True
    )
    direct_grads, gs = backward(jnp.ones_like(losses))

    # Norms.
    # The mask is the state of the loop that this is an attempt of, and so not known.
    sites = keep_sites(uses.groups, xs, gs, direct_grads, (mask, losses))
    norms = gradient_norms(size, sites.formed_gradients(), sites.squared_norms())
    factors = jnp.where(mask, problem.factor_of(norms), 0.0)

    # The sum.
    sums = sites.weighted_sums(factors, leaves)
    return ClippedSum(unflattened(treedef, leaves, sums), norms.value, factors, losses)

  return without_unusable(attempt, problem.batch, problem.mask)


@jax.custom_vjp
def tap(y: jax.Array, slot: jax.Array) -> jax.Array:
  """`y`; its gradient comes out as the gradient of `slot` too."""
  del slot
  return y


tap.defvjp(lambda y, slot: (y, None), lambda _, g: (g, g))


def batch_axes(sites: dict[Path, Site]) -> dict[Path, int]:
  """Of arrays of a site: they carry its loops before the batch."""
  return {at: len(site.view.loops) for at, site in sites.items()}


def make_slot(site: Site, size: int) -> jax.Array:
  """What `tap` leaves the gradients of a site's output in: (loops..., B, ...)."""
  y = site.eqn.outvars[0].aval
  return jnp.zeros([*(loop.length for loop in site.view.loops), size, *y.shape], y.dtype)
