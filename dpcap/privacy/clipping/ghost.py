"""Clipping by two backward passes, one for the norms and one for the sum.

Norms are taken inside the first pass, as soon as a site has its output's gradient, so that
nothing is kept beyond what a plain step keeps, remat included. In the second pass each site weighs its
examples by their factors. Both passes are one compiled loop body that runs twice, from the same
cotangents: compiled twice, or with the losses weighed instead, the backward pass rounds
otherwise, and where a gradient is a small rest of large terms the sum would be of other gradients than
the norms. For the same reason an operation must give the same bits both times: a GPU's sums by atomic
additions (of scattered gradients) do not unless XLA is told so (`--xla_gpu_deterministic_ops`).

Parameters with several uses need the gradients of all at once: those are kept, as in `bookkeeping`.
Source: Li et al. 2021, Large Language Models Can Be Strong Differentially Private Learners, arXiv
2110.05679, section 4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.privacy.clipping import norms, outer_products, weighted_gradients
from dpcap.privacy.clipping.bookkeeping import batch_axes, make_slot, tap
from dpcap.privacy.clipping.computed_once import settled
from dpcap.privacy.clipping.contributions import (
  repeated,
  unflattened,
  weighted_sum,
  without_unusable,
)
from dpcap.privacy.clipping.gradient_norms import gradient_norms
from dpcap.privacy.clipping.kept_sites import keep_sites
from dpcap.privacy.clipping.norms import SquaredNorm
from dpcap.privacy.clipping.replay import replay
from dpcap.privacy.clipping.rounding import at_least_float32, gamma, sum_of_squares, tree_depth
from dpcap.privacy.clipping.strategy import ClippedSum, Problem
from dpcap.privacy.clipping.sites import Site
from dpcap.privacy.clipping.uses import find_uses
from dpcap.privacy.clipping.views import View

PyTree = Any


# Told to the sites in place of factors, which are not negative: to take norms.
_NORMS = -1.0


class _Passes(NamedTuple):
  """What the backward passes hand on.

  Attributes:
    done: how many there were.
    norms, factors: (B,), known after the first.
    sum: known after the second.
  """

  done: jax.Array
  norms: jax.Array
  factors: jax.Array
  sum: PyTree


def ghost(problem: Problem) -> ClippedSum:
  """The clipped sum, from one forward and two backward passes of the batch."""
  uses = find_uses(problem.trace, problem.params)
  leaves, treedef = jax.tree.flatten(problem.params)
  # A site alone, whose loops all slice its parameter, overlaps with nothing else.
  is_alone = lambda group: len(group) == 1 and all(loop.sliced for loop in group[0].view.loops)
  alone = {group[0].path for group in uses.groups if is_alone(group)}
  kept_groups = [group for group in uses.groups if not is_alone(group)]
  kept = {site.path: site for group in kept_groups for site in group}
  by_passes = {site.view.leaf for at, site in uses.sites.items() if at in alone}
  # Autodiff adds up the sites' squares in an order of its own: those of a body and, one by one,
  # those of a scan's iterations.
  scanned = [sum(loop.length for loop in uses.sites[at].view.loops) for at in alone]
  added = gamma(len(alone) + max(scanned, default=0), jnp.float32)
  dtype = functools.reduce(jnp.promote_types, map(jnp.result_type, leaves), jnp.float32)

  def attempt(batch, mask) -> ClippedSum:
    size = mask.shape[0]

    def loss_of_one(shared, direct, slots, squared_norm, example):
      def at_site(site, x, w, slot):
        if site.path in alone:
          y, weight = _observed(site)(x, w, squared_norm)
          return y, (weight, None)
        return tap(site.apply(x, jax.lax.stop_gradient(w)), slot), (None, x)

      mixed = [shared.get(i, direct.get(i, leaf)) for i, leaf in enumerate(leaves)]
      return replay(uses, mixed, example, slots, at_site)

    def forward(*taken):
      axes = batch_axes(uses.sites)
      losses_of = jax.vmap(loss_of_one, (None, 0, batch_axes(kept), 0, 0), (0, axes))
      losses, records = losses_of(*taken, batch)
      weights = {at: records[at][0] for at in alone}
      return (losses, weights), {at: records[at][1] for at in kept}

    (losses, weights), backward, xs = jax.vjp(
      forward,
      # In float32, and cast where they are used: so are their gradients.
      {i: at_least_float32(leaves[i]) for i in by_passes},
      {i: repeated(leaves[i], size) for i in uses.direct},
      {at: make_slot(site, size) for at, site in kept.items()},
      SquaredNorm(*(jnp.zeros(size, dtype) for _ in SquaredNorm._fields)),
      has_aux=True,
    )

    def one_pass(state: _Passes) -> _Passes:
      first = state.done == 0
      # Ones in either pass. That they depend on the state keeps XLA from taking what is
      # the same in both out of the loop, which would keep all gradients.
      seeds = jnp.where(state.factors >= 0, jnp.ones_like(losses), 0)
      told = jnp.where(first, _NORMS, state.factors)
      tell = lambda w: jnp.broadcast_to(told, w.shape).astype(w.dtype)
      sums, direct_grads, gs, of_alone = backward((seeds, jax.tree.map(tell, weights)))
      sites = keep_sites(kept_groups, xs, gs, direct_grads, (state.factors, losses))

      def take_norms():
        in_passes = SquaredNorm(
          of_alone.value,
          of_alone.error + added * (jnp.abs(of_alone.value) + of_alone.error),
          of_alone.rounding * (1 + added),
          of_alone.flushed * (1 + added),
        )
        unformed = [*sites.squared_norms(), in_passes]
        found = gradient_norms(size, sites.formed_gradients(), unformed)
        factors = jnp.where(mask, problem.factor_of(found), 0.0)
        return state._replace(norms=found.value.astype(dtype), factors=factors.astype(dtype))

      def take_sums():
        # Of one parameter there may be sites of both kinds.
        total = sites.weighted_sums(state.factors, leaves)
        for i, term in sums.items():
          total[i] = total[i] + term if i in total else term
        return state._replace(sum=unflattened(treedef, leaves, total))

      after = jax.lax.cond(first, take_norms, take_sums)
      return after._replace(done=state.done + 1)

    nothing = unflattened(treedef, leaves, {})
    zeros = gradient_norms(size, [], [])
    factors = jnp.where(mask, problem.factor_of(zeros), 0.0)
    start = jnp.zeros((), jnp.int32)
    state = _Passes(start, zeros.value.astype(dtype), factors.astype(dtype), nothing)
    # How often it runs is known at run time only: nothing is gained by unrolling it.
    passes = jnp.where(jnp.any(mask), 2, 1)
    state = jax.lax.while_loop(lambda state: state.done < passes, one_pass, state)
    return ClippedSum(state.sum, state.norms, state.factors, losses)

  return without_unusable(attempt, problem.batch, problem.mask)


def _observed(site: Site) -> Callable:
  """The site's equation (x, w, squared_norm) -> (y, weight) for one example, mapped over a batch.

  Its backward pass does what autodiff would not:
  - the gradient of `squared_norm` is that of the example's gradient of `w`;
  - the gradient of `w` is summed with each example weighted by the gradient of the output
    `weight` (itself 0), and in at least float32;
  - only the first of the two is computed where that weight is negative, else only the second.

  Autodiff sees one example at a time and the backward pass needs the batch: `custom_vmap` hands
  the batch to a function with a backward pass of its own.
  """
  site = site._replace(view=View(site.view.leaf))  # here all scans are outside

  @jax.custom_vjp
  def on_batch(x_B, w, squared_norm):
    del squared_norm
    return jax.vmap(site.apply, (0, None))(x_B, w), jnp.zeros(x_B.shape[0], w.dtype)

  def forward(x_B, w, squared_norm):
    return on_batch(x_B, w, squared_norm), (x_B, w, squared_norm)

  def backward(kept, gradients):
    (x_B, w, squared_norm), (g_B, weights_B) = kept, gradients
    if jnp.issubdtype(x_B.dtype, jnp.floating):
      (dx_B,) = jax.vjp(lambda x_B: jax.vmap(site.apply, (0, None))(x_B, w), x_B)[1](g_B)
    else:
      dx_B = np.zeros(x_B.shape, jax.dtypes.float0)
    # Outside of the branches: norm and sum are of the same numbers.
    x_B, g_B = outer_products.in_safe_type(x_B), outer_products.in_safe_type(g_B)
    is_formed = outer_products.is_formed([site], [x_B], [g_B])
    formed_B = outer_products.formed([site], [x_B], [g_B]) if is_formed else None
    if is_formed:
      formed_B = settled(formed_B, weights_B)
    else:
      x_B, g_B = settled((x_B, g_B), weights_B)
    cast = lambda new, old: new.astype(old.dtype)
    dw, squared = jax.lax.cond(
      weights_B[0] < 0,
      lambda: (jnp.zeros_like(w), jax.tree.map(cast, _squared_norm(site, x_B, g_B, formed_B), squared_norm)),
      lambda: (
        _weighted_view(site, x_B, g_B, formed_B, weights_B, w).astype(w.dtype),
        jax.tree.map(jnp.zeros_like, squared_norm),
      ),
    )
    return dx_B, dw, squared

  on_batch.defvjp(forward, backward)

  @jax.custom_batching.custom_vmap
  def on_one(x, w, squared_norm):
    del squared_norm
    return site.apply(x, w), jnp.zeros((), w.dtype)

  @on_one.def_vmap
  def batched(axis_size, in_batched, x, w, squared_norm):
    if not in_batched[0]:
      x = repeated(x, axis_size)
    return on_batch(x, w, squared_norm), (True, True)

  return on_one


def _squared_norm(site: Site, x_B, g_B, formed_B: jax.Array | None) -> SquaredNorm:
  if formed_B is None:
    return norms.squared_norm([site], [x_B], [g_B])
  squares = sum_of_squares(formed_B)
  error = gamma(1 + tree_depth(formed_B[0].size), squares.dtype) * squares
  return SquaredNorm(squares, error, 0 * squares, 0 * squares)


def _weighted_view(site: Site, x_B, g_B, formed_B: jax.Array | None, weights_B, w) -> jax.Array:
  if formed_B is None:
    return weighted_gradients.weighted_gradient_of_view(site, x_B, g_B, weights_B)
  return weighted_gradients.to_parameter(site, weighted_sum(weights_B, formed_B), w)
