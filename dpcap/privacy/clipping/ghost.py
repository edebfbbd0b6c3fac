"""Clipping by two backward passes, one for the norms and one for the sum.

Norms are taken inside the first pass, as soon as a site has its output's gradient
(`ghost_site.py`), so that nothing is kept beyond what a plain step keeps, remat included. In the
second pass each site weighs its examples by their factors. Both passes are one compiled loop body
that runs twice, from the same cotangents: compiled twice, or with the losses weighed instead, the
backward pass rounds otherwise, and where a gradient is a small rest of large terms the sum would be
of other gradients than the norms. For the same reason an operation must give the same bits both
times: a GPU's sums by atomic additions (of scattered gradients) do not unless XLA is told so
(`--xla_gpu_deterministic_ops`).

A parameter with several uses needs the gradients of all at once: those are kept, as in
`bookkeeping`.

Source: Li et al. 2021, Large Language Models Can Be Strong Differentially Private Learners, arXiv
2110.05679, section 4.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.bookkeeping import batch_axes, make_slot, tap
from dpcap.privacy.clipping.contributions import add_term, repeated, unflattened, without_unusable
from dpcap.privacy.clipping.ghost_site import TAKE_NORMS, ghost_site, with_additions
from dpcap.privacy.clipping.gradient_norms import gradient_norms
from dpcap.privacy.clipping.kept_sites import KeptSites, keep_sites
from dpcap.privacy.clipping.norms import SquaredNorm
from dpcap.privacy.clipping.replay import replay
from dpcap.privacy.clipping.rounding import at_least_float32
from dpcap.privacy.clipping.sites import Path, Site
from dpcap.privacy.clipping.strategy import ClippedSum, Problem
from dpcap.privacy.clipping.uses import Uses

PyTree = Any


class _State(NamedTuple):
  """What one backward pass hands on to the next.

  Attributes:
    done: how many there were.
    norms, factors: (B,), known after the first.
    sum: known after the second.
  """

  done: jax.Array
  norms: jax.Array
  factors: jax.Array
  sum: PyTree


class _Gradients(NamedTuple):
  """What a backward pass gives.

  Attributes:
    sums: parameter -> sum of gradients by the sites that are alone, each example's times its
      factor; zeros in a pass that takes norms.
    direct: parameter -> per-example gradients (B, ...).
    gs: of kept sites, the gradients of their outputs.
    norms: of the gradients by all sites that are alone; zeros in a pass that takes sums.
  """

  sums: dict[int, jax.Array]
  direct: dict[int, jax.Array]
  gs: dict[Path, jax.Array]
  norms: SquaredNorm


def ghost(problem: Problem) -> ClippedSum:
  """The clipped sum, from one forward and two backward passes of the batch."""
  uses = problem.uses
  leaves, treedef = jax.tree.flatten(problem.params)
  dtype = functools.reduce(jnp.promote_types, map(jnp.result_type, leaves), jnp.float32)
  alone = [group[0] for group in uses.groups if _is_alone(group)]
  kept = [group for group in uses.groups if not _is_alone(group)]

  def attempt(batch, mask) -> ClippedSum:
    size = mask.shape[0]
    norm_slot = SquaredNorm(*(jnp.zeros(size, dtype) for _ in SquaredNorm._fields))
    losses, backward, xs = _forward(uses, leaves, alone, kept, norm_slot, batch)

    def take_norms(state: _State, found: _Gradients, sites: KeptSites) -> _State:
      unformed = [*sites.squared_norms(), with_additions(found.norms, alone)]
      norms = gradient_norms(size, sites.formed_gradients(), unformed)
      factors = jnp.where(mask, problem.factor_of(norms), 0.0)
      return state._replace(norms=norms.value.astype(dtype), factors=factors.astype(dtype))

    def take_sum(state: _State, found: _Gradients, sites: KeptSites) -> _State:
      total = sites.weighted_sums(state.factors, leaves)
      # Of one parameter there may be sites of both kinds.
      for i, term in found.sums.items():
        add_term(total, i, term)
      return state._replace(sum=unflattened(treedef, leaves, total))

    def one_pass(state: _State) -> _State:
      is_first = state.done == 0
      # Ones in either pass. That they depend on the state keeps XLA from taking what is
      # the same in both out of the loop, which would keep all gradients.
      seeds = jnp.where(state.factors >= 0, jnp.ones_like(losses), 0)
      found = backward(seeds, jnp.where(is_first, TAKE_NORMS, state.factors))
      sites = keep_sites(kept, xs, found.gs, found.direct, (state.factors, losses))
      after = jax.lax.cond(
        is_first, lambda: take_norms(state, found, sites), lambda: take_sum(state, found, sites)
      )
      return after._replace(done=state.done + 1)

    state = _State(
      done=jnp.zeros((), jnp.int32),
      norms=jnp.zeros(size, dtype),
      factors=mask.astype(dtype),  # any that are not known when this is compiled
      sum=unflattened(treedef, leaves, {}),
    )
    # How often it runs is known at run time only: nothing is gained by unrolling it.
    passes = jnp.where(jnp.any(mask), 2, 1)
    state = jax.lax.while_loop(lambda state: state.done < passes, one_pass, state)
    return ClippedSum(state.sum, state.norms, state.factors, losses)

  return without_unusable(attempt, problem.batch, problem.mask)


def _is_alone(group: tuple[Site, ...]) -> bool:
  """Whether a group is a single site that no scan applies to the same entries twice."""
  return len(group) == 1 and all(loop.sliced for loop in group[0].view.loops)


def _forward(
  uses: Uses,
  leaves: Sequence[jax.Array],
  alone: Sequence[Site],
  kept: Sequence[tuple[Site, ...]],
  norm_slot: SquaredNorm,
  batch: PyTree,
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], _Gradients], dict[Path, jax.Array]]:
  """The forward pass of a batch, with ghost sites and, for those that are kept, taps.

  Returns:
    (B,) losses; the backward pass, of the losses' cotangents (B,) and an order (B,) to the ghost
    sites; and what kept sites were fed.
  """
  (size,) = norm_slot.value.shape
  ghosts = {site.path for site in alone}
  tapped = {site.path: site for group in kept for site in group}

  def loss_of_one(shared, direct, slots, norm_slot, example):
    def at_site(site, x, w, slot):
      if site.path in ghosts:
        y, order = ghost_site(site)(x, w, norm_slot)
        return y, (order, None)
      return tap(site.apply(x, jax.lax.stop_gradient(w)), slot), (None, x)

    mixed = [shared.get(i, direct.get(i, leaf)) for i, leaf in enumerate(leaves)]
    return replay(uses, mixed, example, slots, at_site)

  def forward(*taken):
    in_axes = (None, 0, batch_axes(tapped), 0, 0)
    losses_of = jax.vmap(loss_of_one, in_axes, (0, batch_axes(uses.sites)))
    losses, records = losses_of(*taken, batch)
    orders = {at: records[at][0] for at in ghosts}
    return (losses, orders), {at: records[at][1] for at in tapped}

  (losses, orders), vjp, xs = jax.vjp(
    forward,
    # In float32, and cast where they are used: so are their gradients.
    {i: at_least_float32(leaves[i]) for i in {site.view.leaf for site in alone}},
    {i: repeated(leaves[i], size) for i in uses.direct},
    {at: make_slot(site, size) for at, site in tapped.items()},
    norm_slot,
    has_aux=True,
  )

  def backward(seeds: jax.Array, order: jax.Array) -> _Gradients:
    tell = lambda zeros: jnp.broadcast_to(order, zeros.shape).astype(zeros.dtype)
    return _Gradients(*vjp((seeds, jax.tree.map(tell, orders))))

  return losses, backward, xs
