"""Norms and sums of sites whose inputs and output gradients are all at hand."""

import collections
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping import norms, outer_products
from dpcap.privacy.clipping.computed_once import settled
from dpcap.privacy.clipping.contributions import add_term, weighted_sum
from dpcap.privacy.clipping.norms import SquaredNorm
from dpcap.privacy.clipping.sites import Path, Site
from dpcap.privacy.clipping.weighted_gradients import to_parameter, weighted_gradient

PyTree = Any

# What the sites of a group were fed, and the gradients of their outputs.
_Arrays = tuple[list[jax.Array], list[jax.Array]]


class KeptSites(NamedTuple):
  """A batch's gradients at the sites of some parameters, before they are weighed.

  Attributes:
    groups: of sites (`Uses.groups`), those that are not formed.
    xs, gs: of these, what each site was fed, and the gradients of its output.
    formed: site -> per-example gradients (B, ...) of the group that it stands for.
    direct: parameter -> per-example gradients (B, ...).
  """

  groups: list[tuple[Site, ...]]
  xs: dict[Path, jax.Array]
  gs: dict[Path, jax.Array]
  formed: list[tuple[Site, jax.Array]]
  direct: dict[int, jax.Array]

  def formed_gradients(self) -> list[jax.Array]:
    """Per-example gradients that are summed as they are."""
    return [*self.direct.values(), *(g for _, g in self.formed)]

  def squared_norms(self) -> list[SquaredNorm]:
    """Of what each group that is not formed adds to each example's gradient.

    Groups that are alike, as those of a network's layers are, take turns in one loop: what
    takes their norms is the most there is to compile, and holds memory of its own.
    """
    alike = collections.defaultdict(list)
    for group in self.groups:
      arrays = _of_group(group, self.xs, self.gs)
      alike[_kind(group, arrays)].append((group, arrays))
    return [norm for groups in alike.values() for norm in _norms_of_alike(groups)]

  def weighted_sums(
    self, weights_B: jax.Array, leaves: Sequence[jax.Array] | dict[int, jax.Array]
  ) -> dict[int, jax.Array]:
    """sum_b weights_b (gradient of example b), by parameter; `leaves` are the parameters."""
    sums = {i: weighted_sum(weights_B, g_B) for i, g_B in self.direct.items()}
    for site, g_B in self.formed:
      i = site.view.leaf
      add_term(sums, i, to_parameter(site, weighted_sum(weights_B, g_B), leaves[i]))
    for site in itertools.chain(*self.groups):
      i, (x, g) = site.view.leaf, (self.xs[site.path], self.gs[site.path])
      add_term(sums, i, weighted_gradient(site, x, g, weights_B, leaves[i]))
    return sums


def keep_sites(
  groups: Sequence[tuple[Site, ...]],
  xs: dict[Path, jax.Array],
  gs: dict[Path, jax.Array],
  direct: dict[int, jax.Array],
  witness: PyTree,
) -> KeptSites:
  """Forms the gradients that are smaller than what they are made of, keeps the rest as it is.

  All that is kept is `settled`, by that witness: norms and sums are of the same numbers.
  """
  xs, gs = jax.tree.map(outer_products.in_safe_type, (xs, gs))
  unformed, formed = [], []
  for group in groups:
    arrays = _of_group(group, xs, gs)
    if outer_products.is_formed(group, *arrays):
      formed.append((group[0], outer_products.formed(group, *arrays)))
    else:
      unformed.append(group)
  paths = [site.path for group in unformed for site in group]
  kept = [{at: arrays[at] for at in paths} for arrays in (xs, gs)]
  stand_for, grads = [site for site, _ in formed], [g for _, g in formed]
  (xs, gs), grads, direct = settled((kept, grads, direct), witness)
  return KeptSites(unformed, xs, gs, list(zip(stand_for, grads)), direct)


def _kind(group: tuple[Site, ...], arrays: _Arrays) -> str:
  """What decides how the norms of a group are computed; equal for groups that are alike."""
  sites = [
    (str(s.eqn.primitive), str(s.eqn.params), [str(v.aval) for v in s.eqn.invars], s.w)
    + (s.view.chain, s.view.loops)
    for s in group
  ]
  return str((sites, jax.tree.map(lambda y: f'{y.dtype}{y.shape}', arrays)))


def _norms_of_alike(groups: list[tuple[tuple[Site, ...], _Arrays]]) -> list[SquaredNorm]:
  """Of groups of one kind, each with its arrays."""
  sites, arrays = groups[0]
  if len(groups) == 1:
    return [norms.squared_norm(sites, *arrays)]
  choices = [lambda arrays=arrays: arrays for _, arrays in groups]
  by_number = lambda i: norms.squared_norm(sites, *jax.lax.switch(i, choices))
  stacked = jax.lax.map(by_number, jnp.arange(len(groups)))
  return [jax.tree.map(lambda y: y[i], stacked) for i in range(len(groups))]


def _of_group(group, xs, gs) -> _Arrays:
  return [xs[site.path] for site in group], [gs[site.path] for site in group]
