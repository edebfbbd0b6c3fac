"""Where parameters meet examples: what the trace of a loss does with each parameter.

The loss of one example is traced to a jaxpr. A parameter, possibly reshaped, transposed, sliced or
cast on its way (a `View`), meets values that depend on the example in some equation. Where that
equation is a matrix product, a convolution or a lookup of rows (a `Site`), the parameter's
per-example gradient is a sum over tokens of outer products,

    A^T G,   A: what the site was fed (tokens x inputs),  G: its output's gradient,

and needs never be formed (`outer_products.py`). A parameter that meets examples in any other way
is *direct*: differentiated for each example by itself. That is the right way for biases,
scales and lone parameters, and exact for all, but holds one gradient per example; for a
parameter that is not only added, multiplied or the like it is a fallback and warned of.

How it is found: each value of the trace has a status, from the least to the most that is known of
it, and an equation gives its outputs theirs. CONSTANT is of neither parameters nor examples,
EXAMPLE is of an example, Derived of some parameters alone, a View a selection of one parameter's
entries.
"""

import dataclasses
import enum
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from dpcap.privacy.clipping.jax_internals import CALLS, open_jaxpr, scan_operands
from dpcap.privacy.clipping.rounding import FLOATS
from dpcap.privacy.clipping.sites import Path, Site, as_site, group_sites, obstacle
from dpcap.privacy.clipping.views import Loop, View, views_by

PyTree = Any

# Where a parameter meets examples in these, direct differentiation is no fallback.
_ELEMENTWISE = {
  primitives.add_p, primitives.sub_p, primitives.mul_p, primitives.div_p, primitives.pow_p,
  primitives.max_p, primitives.min_p, primitives.select_n_p, primitives.concatenate_p,
  primitives.eq_p, primitives.ne_p, primitives.lt_p, primitives.le_p, primitives.gt_p,
  primitives.ge_p,
}  # fmt: skip


class ClippingFallbackWarning(UserWarning):
  """A parameter's gradient is held for each example, as strategy 'vmap' does."""


class Uses(NamedTuple):
  """What `find_uses` knows of a loss.

  Attributes:
    trace: of the loss of one example: flat parameters, then the flat example.
    direct: those whose gradient is taken for each example.
    sites: by path.
    groups: the sites of one parameter whose gradients overlap, together: their norms have
      cross terms. A parameter may have several disjoint groups.
    entered: calls and scans that views go into.
    casts: equations that only cast a view, left out in a replay.
    remat: whether a site lies in a region that is computed again in the backward pass.
  """

  trace: core.ClosedJaxpr
  direct: frozenset[int]
  sites: dict[Path, Site]
  groups: tuple[tuple[Site, ...], ...]
  entered: frozenset[Path]
  casts: frozenset[Path]
  remat: bool


def find_uses(trace: core.ClosedJaxpr, params: PyTree, warn: bool = True) -> Uses:
  """Finds how the trace of a loss (by `tracing.trace_loss`) uses each parameter.

  Warns once (ClippingFallbackWarning), naming all parameters that fall back, if `warn`.
  """
  struct = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
  named = jax.tree_util.tree_leaves_with_path(jax.tree.map(struct, params))
  leaves = [leaf for _, leaf in named]
  # A parameter without entries has no gradient to factor.
  found = _Found({i for i, leaf in enumerate(leaves) if not leaf.size}, {})
  # A parameter that proves direct is like an example to all that it meets: look again.
  while True:
    known = found
    search = _Search(leaves, _Found(set(known.direct), dict(known.fallbacks)))
    groups = search.run(trace.jaxpr)
    found = search.found
    if found.direct == known.direct:
      break
  if found.fallbacks and warn:
    _warn(named, found.fallbacks)
  return Uses(
    trace=trace,
    direct=frozenset(found.direct),
    sites=found.sites,
    groups=groups,
    entered=frozenset(found.entered),
    casts=frozenset(found.casts),
    remat=found.remat,
  )


def _warn(named: list[tuple[Any, Any]], fallbacks: dict[int, str]) -> None:
  said = [
    f'{jax.tree_util.keystr(path, simple=True, separator="/")} {leaf.shape}: used by {fallbacks[i]}'
    for i, (path, leaf) in enumerate(named)
    if i in fallbacks
  ]
  warnings.warn(
    'clipped by vmap, which holds the gradient of each example (exact, but slow and large): '
    + '; '.join(said),
    ClippingFallbackWarning,
    stacklevel=3,
  )


class Plain(enum.Enum):
  """A value that is no parameter's, nor derived from one alone."""

  CONSTANT = 'of neither parameters nor examples'
  EXAMPLE = 'of an example'


CONSTANT, EXAMPLE = Plain


class Derived(NamedTuple):
  """A value computed from parameters alone, in another way than a View."""

  leaves: frozenset[int]


Status = Plain | Derived | View


@dataclasses.dataclass
class _Found:
  """What a search knows by now; grows only.

  Attributes:
    direct: the parameters whose gradient is taken for each example.
    fallbacks: those of them for which that is costly, and what uses them so.
    sites, entered, casts, remat: as in Uses.
  """

  direct: set[int]
  fallbacks: dict[int, str]
  sites: dict[Path, Site] = dataclasses.field(default_factory=dict)
  entered: set[Path] = dataclasses.field(default_factory=set)
  casts: set[Path] = dataclasses.field(default_factory=set)
  remat: bool = False

  def copy(self) -> '_Found':
    """A copy that grows by itself."""
    grown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return _Found(**{k: v if isinstance(v, bool) else v.copy() for k, v in grown.items()})


class _Search:
  """One pass over the trace of a loss, which adds to `found`."""

  def __init__(self, leaves: list[jax.ShapeDtypeStruct], found: _Found):
    self.leaves = leaves
    self.found = found

  def run(self, jaxpr: core.Jaxpr) -> tuple[tuple[Site, ...], ...]:
    """Finds all, and returns the groups of sites."""
    count = len(self.leaves)
    statuses = [EXAMPLE if i in self.found.direct else View(i) for i in range(count)]
    statuses += [EXAMPLE] * (len(jaxpr.invars) - count)
    for status in self._visit(jaxpr, statuses, (), ()):
      self._mark_direct(status)
    groups = self._groups()
    also = 'in another way that is not a product with examples'
    for site in self.found.sites.values():
      if site.view.leaf in self.found.direct:
        self._mark_direct(site.view, f'{site.eqn.primitive.name} and {also}')
    return groups

  def _visit(self, jaxpr: core.Jaxpr, statuses: list, path: Path, loops: tuple[Loop, ...]) -> list:
    """Statuses of the outputs from those of the inputs."""
    env = dict(zip(jaxpr.invars, statuses, strict=True))
    read = lambda v: CONSTANT if isinstance(v, core.Literal) else env.get(v, CONSTANT)
    for i, eqn in enumerate(jaxpr.eqns):
      outs = self._equation(eqn, [read(v) for v in eqn.invars], (*path, i), loops)
      env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn, ins: list, path: Path, loops: tuple[Loop, ...]) -> list:
    primitive = eqn.primitive
    if primitive is primitives.scan_p:
      return self._scan(eqn, ins, path, loops)
    if not any(isinstance(s, (View, Derived)) for s in ins):
      return [EXAMPLE if EXAMPLE in ins else CONSTANT] * len(eqn.outvars)
    if primitive is primitives.stop_gradient_p:
      return [s if s == EXAMPLE else CONSTANT for s in ins]
    if primitive in CALLS:
      self.found.entered.add(path)
      before = len(self.found.sites)
      outs = self._visit(open_jaxpr(eqn.params[CALLS[primitive]])[0], ins, path, loops)
      self.found.remat |= primitive is primitives.remat_p and len(self.found.sites) > before
      return outs
    if EXAMPLE not in ins:
      return self._of_parameters_alone(eqn, ins, path)
    views = [i for i, s in enumerate(ins) if isinstance(s, View)]
    site = as_site(eqn, ins[views[0]], views[0], path) if len(views) == 1 else None
    if site is not None:
      self.found.sites[path] = site
    else:
      for status in ins:
        self._mark_direct(status, None if primitive in _ELEMENTWISE else primitive.name)
    return [EXAMPLE] * len(eqn.outvars)

  def _of_parameters_alone(self, eqn, ins: list, path: Path) -> list:
    if isinstance(ins[0], View) and len(ins) == 1:
      if eqn.primitive is primitives.convert_element_type_p:
        return [self._cast(ins[0], eqn, path)]
      views = views_by(eqn, ins[0])
      if views:
        return views
    for status in ins:
      self._mark_direct(status)
    return [_derived(ins)] * len(eqn.outvars)

  def _cast(self, view: View, eqn, path: Path) -> Status:
    """Casts are left out where the last one alone, at the site, gives the same."""
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    nothing_lost = jnp.promote_types(before, self.leaves[view.leaf].dtype) == before
    if after in FLOATS and nothing_lost:
      self.found.casts.add(path)
      return view
    has_gradient = jnp.issubdtype(after, jnp.floating)
    self._mark_direct(view, f'a cast from {before} to {after}' if has_gradient else None)
    return _derived([view])

  def _scan(self, eqn, ins: list, path: Path, loops: tuple[Loop, ...]) -> list:
    consts, carries = scan_operands(eqn)
    length = eqn.params['length']
    body = open_jaxpr(eqn.params['jaxpr'])[0]

    def inside(i, status):
      carried = consts <= i < consts + carries
      if isinstance(status, View) and not carried:
        return status.inside(Loop(sliced=i >= consts, length=length))
      self._mark_direct(status)
      return Derived(frozenset([status.leaf])) if isinstance(status, View) else status

    ins = [inside(i, s) for i, s in enumerate(ins)]
    if any(isinstance(s, View) for s in ins):
      self.found.entered.add(path)
    # What the carry depends on is a fixed point; only the visit that finds it counts.
    while True:
      trial = _Search(self.leaves, self.found.copy())
      outs = trial._visit(body, ins, path, loops)
      carry = ins[consts : consts + carries]
      grown = [old if old == new else EXAMPLE for old, new in zip(carry, outs)]
      if grown == carry:
        break
      ins[consts : consts + carries] = grown
    self.found = trial.found
    for status in outs:
      self._mark_direct(status)
    return [EXAMPLE if s == EXAMPLE else CONSTANT if s == CONSTANT else _derived([s]) for s in outs]

  def _groups(self) -> tuple[tuple[Site, ...], ...]:
    """The groups of all parameters; one whose groups cannot be told apart becomes direct."""
    groups = []
    by_leaf = {}
    for site in self.found.sites.values():
      by_leaf.setdefault(site.view.leaf, []).append(site)
    for leaf, sites in by_leaf.items():
      of_leaf = group_sites(sites)
      reason = obstacle(of_leaf, self.leaves[leaf].shape)
      if reason:
        self._mark_direct(View(leaf), reason)
      else:
        groups += of_leaf
    return tuple(groups)

  def _mark_direct(self, status: Status, reason: str | None = None):
    """Every parameter in `status` is direct, as a fallback where a reason is given."""
    for leaf in _derived([status]).leaves:
      self.found.direct.add(leaf)
      if reason:
        self.found.fallbacks.setdefault(leaf, reason)


def _derived(statuses) -> Derived:
  leaves = {View: lambda s: {s.leaf}, Derived: lambda s: s.leaves}
  found = [leaves[type(s)](s) for s in statuses if type(s) in leaves]
  return Derived(frozenset().union(*found))
