"""Sites: the equations in which a parameter meets an example in a linear way.

A site is a matrix product, a convolution or a lookup of rows, one of whose operands is a view of a
parameter and the other what an example feeds it. Sites that see the same entries of a parameter
are a group: what they add to its gradient overlaps, so that the norm of the sum has cross terms.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives

from dpcap.privacy.clipping.rounding import FLOATS
from dpcap.privacy.clipping.views import View, base_chain, base_permutation, disjoint

Path = tuple[int, ...]  # of an equation: its index, and those of the equations it is nested in


class Site(NamedTuple):
  """An equation in which a view of a parameter meets an example's activations.

  Attributes:
    path: of the equation.
    view: the operand that is a parameter.
    eqn: the equation: dot_general, conv_general_dilated or gather.
    w: position of the parameter among the operands; x, of the activations (or row indices).
  """

  path: Path
  view: View
  eqn: core.JaxprEqn
  w: int

  @property
  def x(self) -> int:
    return 1 - self.w

  @property
  def rank(self) -> int:
    """Of the parameter's view."""
    return self.eqn.invars[self.w].aval.ndim

  def apply(self, x: jax.Array, w: jax.Array, dtype=None) -> jax.Array:
    """The equation on one example's `x` and the parameter's view `w`.

    Types and precision are the equation's own; with `dtype`, `w` and the result have that
    type and the precision is the highest.
    """
    params = dict(self.eqn.params)
    if dtype is None:
      w = w.astype(self.eqn.invars[self.w].aval.dtype)
    elif 'precision' in params:
      highest = jax.lax.Precision.HIGHEST
      params |= {'precision': (highest, highest), 'preferred_element_type': dtype}
    operands = (x, w) if self.w else (w, x)
    return self.eqn.primitive.bind(*operands, **params)


def as_site(eqn: core.JaxprEqn, view: View, w: int, path: Path) -> Site | None:
  """The equation of a view, its operand `w`, and an example, if it is one of the three kinds."""
  if len(eqn.invars) != 2:
    return None
  site = Site(path, view, eqn, w)
  is_lookup = eqn.primitive is primitives.gather_p
  fed = eqn.outvars if is_lookup else [eqn.invars[site.x], *eqn.outvars]
  if any(v.aval.dtype not in FLOATS for v in fed):
    return None
  is_one = {
    primitives.dot_general_p: lambda: True,
    primitives.conv_general_dilated_p: lambda: w == 1 and eqn.params['batch_group_count'] == 1,
    primitives.gather_p: lambda: w == 0 and _looks_up_rows(eqn),
  }
  return site if is_one.get(eqn.primitive, lambda: False)() else None


def _looks_up_rows(eqn: core.JaxprEqn) -> bool:
  """Whether a gather takes whole slices along one dimension, as embeddings do."""
  numbers, shape = eqn.params['dimension_numbers'], eqn.invars[0].aval.shape
  modes = jax.lax.GatherScatterMode
  return (
    len(numbers.start_index_map) == 1
    and numbers.collapsed_slice_dims == numbers.start_index_map
    and not numbers.operand_batching_dims
    and all(
      size == (1 if d in numbers.collapsed_slice_dims else shape[d])
      for d, size in enumerate(eqn.params['slice_sizes'])
    )
    and eqn.params['mode'] in (modes.CLIP, modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)
  )


class Roles(NamedTuple):
  """Dimensions of a site's view, by what they run along.

  Inputs are what activations are contracted with (for a lookup: the row). Each is in ascending
  order of the dimensions before transposes, so that two sites of a group agree.
  """

  batch: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def roles(site: Site) -> Roles:
  """What the dimensions of a site's view run along."""
  params = site.eqn.params
  if site.eqn.primitive is primitives.dot_general_p:
    contracted, batched = (dims[site.w] for dims in params['dimension_numbers'])
  elif site.eqn.primitive is primitives.gather_p:
    contracted, batched = params['dimension_numbers'].start_index_map, ()
  else:
    spec = params['dimension_numbers'].rhs_spec  # outputs, inputs, space
    contracted, batched = spec[1:], ()
  _, order = base_permutation(site.view, site.rank)
  by_base = lambda dims: tuple(sorted(dims, key=lambda d: order[d]))
  outputs = set(range(site.rank)) - set(contracted) - set(batched)
  return Roles(by_base(batched), by_base(contracted), by_base(outputs))


def base_roles(site: Site) -> Roles:
  """The same, as dimensions are numbered before transposes."""
  _, order = base_permutation(site.view, site.rank)
  return Roles(*(tuple(order[d] for d in dims) for dims in roles(site)))


def group_sites(sites: Iterable[Site]) -> list[tuple[Site, ...]]:
  """The sites of one parameter, those together that see the same entries of it."""
  groups = {}
  for site in sites:
    groups.setdefault(base_chain(site.view), []).append(site)
  return [tuple(group) for group in groups.values()]


def obstacle(groups: Sequence[tuple[Site, ...]], shape: tuple[int, ...]) -> str | None:
  """Why norms cannot be taken group by group, for a parameter of this shape; None if they can."""
  chains = [base_chain(group[0].view) for group in groups]
  if len(groups) > 1 and not disjoint(chains, shape):
    return 'several products that share parts of it'
  if not all(map(_add_up, groups)):
    return 'several products of different kinds'
  return None


def _add_up(group: tuple[Site, ...]) -> bool:
  """Whether the gradients of these sites add up to one sum of outer products."""
  if len(group) == 1:
    return True
  kinds = {site.eqn.primitive for site in group}
  if primitives.conv_general_dilated_p in kinds:
    layouts = {
      (s.eqn.params['dimension_numbers'].rhs_spec, s.eqn.params['feature_group_count'])
      for s in group
    }
    return len(kinds) == len(layouts) == len({s.view.chain for s in group}) == 1
  # A transposed use has inputs where others have outputs.
  in_base = [base_roles(site) for site in group]
  if len({(r.batch, frozenset([r.inputs, r.outputs])) for r in in_base}) > 1:
    return False
  lookups = zip(group, in_base, strict=True)
  return len({r.inputs for s, r in lookups if s.eqn.primitive is primitives.gather_p}) <= 1
