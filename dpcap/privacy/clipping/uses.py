"""Where parameters meet examples: what the trace of a loss does with each parameter.

The loss of one example is traced to a jaxpr. A parameter, possibly reshaped, transposed,
sliced or cast on its way, meets values that depend on the example in some equation. Where
that equation is a matrix product, a convolution or a lookup of rows (a *site*), the
parameter's per-example gradient is a sum over tokens of outer products,

    A^T G,   A: what the site was fed (tokens x inputs),  G: its output's gradient,

and needs never be formed (`outer_products.py`). A parameter that meets examples in any other way
is *direct*: differentiated for each example by itself. That is the right way for biases,
scales and lone parameters, and exact for all, but holds one gradient per example; for a
parameter that is not only added, multiplied or the like it is a fallback and warned of.
"""

import dataclasses
import enum
import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as p

from dpcap.privacy.clipping.jax_internals import CALLS, open_jaxpr, scan_operands

PyTree = Any
Path = tuple[int, ...]  # of an equation: its index, and those of the equations it is nested in


class ClippingFallbackWarning(UserWarning):
  """A parameter's gradient is held for each example, as strategy 'vmap' does."""


class Op(NamedTuple):
  """One step from a parameter to the view of it that a site uses."""

  primitive: Any  # None: a scan takes a slice per iteration
  params: tuple[tuple[str, Any], ...] = ()


SLICED_BY_SCAN = Op(None)

# Types of parameters, and of products whose norms are known to be right.
FLOATS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))


class Loop(NamedTuple):
  """A scan around a site. `sliced`: each iteration sees its own slice of the parameter."""

  sliced: bool
  length: int


class View(NamedTuple):
  """A selection of a parameter's entries, each at most once, in some order.

  Attributes:
    leaf: index of the parameter.
    chain: the steps that lead to it; casts are left out.
    loops: the scans around it, outermost first.
  """

  leaf: int
  chain: tuple[Op, ...] = ()
  loops: tuple[Loop, ...] = ()

  def then(self, primitive, **params) -> 'View':
    """The view that an operation makes of this one."""
    return self._replace(chain=(*self.chain, Op(primitive, tuple(sorted(params.items())))))


class Derived(NamedTuple):
  """A value computed from parameters alone, in another way than a View."""

  leaves: frozenset[int]


class Plain(enum.Enum):
  """A value that is no parameter's, nor derived from one alone."""

  CONSTANT = 'of neither parameters nor examples'
  EXAMPLE = 'of an example'


CONSTANT, EXAMPLE = Plain

# What a value in a trace is, from the least to the most that is known of it.
Status = Plain | Derived | View


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


class Uses(NamedTuple):
  """What `find_uses` knows of a loss.

  Attributes:
    jaxpr: of the loss of one example: flat parameters, then the flat example.
    leaves: number of parameters.
    direct: those whose gradient is taken for each example.
    sites: by path.
    groups: the sites of one parameter whose gradients overlap, together: their norms have
      cross terms. A parameter may have several disjoint groups.
    entered: calls and scans that views go into.
    casts: equations that only cast a view, left out in a replay.
    remat: whether a site lies in a region that is computed again in the backward pass.
  """

  jaxpr: core.ClosedJaxpr
  leaves: int
  direct: frozenset[int]
  sites: dict[Path, Site]
  groups: tuple[tuple[Site, ...], ...]
  entered: frozenset[Path]
  casts: frozenset[Path]
  remat: bool


def find_uses(jaxpr: core.ClosedJaxpr, params: PyTree, warn: bool = True) -> Uses:
  """Finds how the trace of a loss, of `tracing.trace_loss`, uses each parameter.

  Warns once (ClippingFallbackWarning), naming all parameters that fall back, if `warn`.
  """
  struct = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
  params = jax.tree.map(struct, params)
  named = jax.tree_util.tree_leaves_with_path(params)
  # A parameter without entries has no gradient to factor.
  direct = {i for i, (_, leaf) in enumerate(named) if not np.prod(leaf.shape)}
  fallbacks: dict[int, str] = {}
  # A parameter that proves direct is like an example to all that it meets: look again.
  while True:
    search = _Search([leaf.dtype for _, leaf in named], _Found(set(direct), dict(fallbacks)))
    statuses = [EXAMPLE if i in direct else View(i) for i in range(len(named))]
    statuses += [EXAMPLE] * (len(jaxpr.jaxpr.invars) - len(named))
    for status in search.visit(jaxpr.jaxpr, statuses, (), ()):
      search.mark_direct(status)
    groups = search.group_sites([leaf.shape for _, leaf in named])
    found = search.found
    if found.direct == direct:
      break
    for site in found.sites.values():
      if site.view.leaf in found.direct:
        found.fallbacks.setdefault(
          site.view.leaf,
          f'{site.eqn.primitive.name} and in another way that is not a product with examples',
        )
    direct, fallbacks = found.direct, found.fallbacks
  said = [
    f'{jax.tree_util.keystr(path, simple=True, separator="/")} {leaf.shape}: used by {fallbacks[i]}'
    for i, (path, leaf) in enumerate(named)
    if i in fallbacks
  ]
  if said and warn:
    warnings.warn(
      'clipped by vmap, which holds the gradient of each example (exact, but slow and large): '
      + '; '.join(said),
      ClippingFallbackWarning,
      stacklevel=2,
    )
  return Uses(
    jaxpr=jaxpr,
    leaves=len(named),
    direct=frozenset(direct),
    sites=found.sites,
    groups=groups,
    entered=frozenset(found.entered),
    casts=frozenset(found.casts),
    remat=found.remat,
  )


# Selections of a parameter's entries: each entry at most once.
_SELECTIONS = (p.reshape_p, p.transpose_p, p.squeeze_p, p.slice_p, p.rev_p, p.broadcast_in_dim_p)

# Where a parameter meets examples in these, direct differentiation is no fallback.
_ELEMENTWISE = {
  p.add_p, p.sub_p, p.mul_p, p.div_p, p.max_p, p.min_p, p.pow_p, p.select_n_p, p.concatenate_p,
  p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p,
}  # fmt: skip

# Comparing all entries of larger parameters would take long; their uses count as overlapping.
_LARGEST_COMPARED = 2**24


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
  """One pass over a jaxpr, which adds to `found`."""

  def __init__(self, dtypes: list[np.dtype], found: _Found):
    self.dtypes = dtypes
    self.found = found

  def mark_direct(self, status: Status, reason: str | None = None):
    """Every parameter in `status` is direct, as a fallback where a reason is given."""
    for leaf in _derived([status]).leaves:
      self.found.direct.add(leaf)
      if reason:
        self.found.fallbacks.setdefault(leaf, reason)

  def visit(self, jaxpr: core.Jaxpr, statuses: list, path: Path, loops: tuple[Loop, ...]) -> list:
    """Statuses of the outputs from those of the inputs."""
    env = dict(zip(jaxpr.invars, statuses, strict=True))
    read = lambda v: CONSTANT if isinstance(v, core.Literal) else env.get(v, CONSTANT)
    for i, eqn in enumerate(jaxpr.eqns):
      outs = self._equation(eqn, [read(v) for v in eqn.invars], (*path, i), loops)
      env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn, ins: list, path: Path, loops: tuple[Loop, ...]) -> list:
    primitive = eqn.primitive
    if primitive is p.scan_p:
      return self._scan(eqn, ins, path, loops)
    if not any(isinstance(s, (View, Derived)) for s in ins):
      return [EXAMPLE if EXAMPLE in ins else CONSTANT] * len(eqn.outvars)
    if primitive is p.stop_gradient_p:
      return [s if s == EXAMPLE else CONSTANT for s in ins]
    if primitive in CALLS:
      self.found.entered.add(path)
      before = len(self.found.sites)
      outs = self.visit(open_jaxpr(eqn.params[CALLS[primitive]])[0], ins, path, loops)
      self.found.remat |= primitive is p.remat_p and len(self.found.sites) > before
      return outs
    if EXAMPLE not in ins:
      return self._of_parameters_alone(eqn, ins, path)
    site = _site(eqn, ins, path)
    if site is not None:
      self.found.sites[path] = site
    else:
      for status in ins:
        self.mark_direct(status, None if primitive in _ELEMENTWISE else primitive.name)
    return [EXAMPLE] * len(eqn.outvars)

  def _of_parameters_alone(self, eqn, ins: list, path: Path) -> list:
    view, primitive = ins[0], eqn.primitive
    if isinstance(view, View) and len(ins) == 1:
      before, after = eqn.invars[0].aval, eqn.outvars[0].aval
      if primitive is p.convert_element_type_p:
        return self._cast(view, before.dtype, after.dtype, path)
      spreads = primitive is p.broadcast_in_dim_p and before.size != after.size
      if primitive in _SELECTIONS and not spreads:
        return [view.then(primitive, **eqn.params)]
      if primitive.name == 'split':
        return [view.then(p.slice_p, **part) for part in _parts(before.shape, **eqn.params)]
    for status in ins:
      self.mark_direct(status)
    return [_derived(ins)] * len(eqn.outvars)

  def _cast(self, view: View, before: np.dtype, after: np.dtype, path: Path) -> list:
    """Casts are left out where the last one alone, at the site, gives the same."""
    nothing_lost = jnp.promote_types(before, self.dtypes[view.leaf]) == before
    if after in FLOATS and nothing_lost:
      self.found.casts.add(path)
      return [view]
    has_gradient = jnp.issubdtype(after, jnp.floating)
    self.mark_direct(view, f'a cast from {before} to {after}' if has_gradient else None)
    return [_derived([view])]

  def _scan(self, eqn, ins: list, path: Path, loops: tuple[Loop, ...]) -> list:
    consts, carries = scan_operands(eqn)
    length = eqn.params['length']
    body = open_jaxpr(eqn.params['jaxpr'])[0]

    def inside(i, status):
      carried = consts <= i < consts + carries
      if isinstance(status, View) and not carried:
        sliced = i >= consts
        chain = (*status.chain, SLICED_BY_SCAN) if sliced else status.chain
        return View(status.leaf, chain, (*status.loops, Loop(sliced, length)))
      self.mark_direct(status)
      return Derived(frozenset([status.leaf])) if isinstance(status, View) else status

    ins = [inside(i, s) for i, s in enumerate(ins)]
    if any(isinstance(s, View) for s in ins):
      self.found.entered.add(path)
    # What the carry depends on is a fixed point; only the last visit counts.
    while True:
      before = self.found.copy()
      outs = self.visit(body, ins, path, loops)
      carry = ins[consts : consts + carries]
      grown = [old if old == new else EXAMPLE for old, new in zip(carry, outs)]
      if grown == carry:
        break
      ins[consts : consts + carries] = grown
      self.found = before
    for status in outs:
      self.mark_direct(status)
    return [EXAMPLE if s == EXAMPLE else CONSTANT if s == CONSTANT else _derived([s]) for s in outs]

  def group_sites(self, shapes: list[tuple[int, ...]]) -> tuple[tuple[Site, ...], ...]:
    """The sites of each parameter, those together whose norms have cross terms.

    A parameter whose uses can neither be told apart nor combined becomes direct.
    """
    groups = []
    by_leaf = {}
    for site in self.found.sites.values():
      by_leaf.setdefault(site.view.leaf, []).append(site)
    for leaf, sites in by_leaf.items():
      of_leaf = {}
      for site in sites:
        of_leaf.setdefault(_base_chain(site.view), []).append(site)
      chains = list(of_leaf)
      if len(chains) > 1 and not _disjoint(chains, shapes[leaf]):
        self.mark_direct(View(leaf), 'several products that share parts of it')
      elif not all(_combine(group) for group in of_leaf.values()):
        self.mark_direct(View(leaf), 'several products of different kinds')
      else:
        groups += [tuple(group) for group in of_leaf.values()]
    return tuple(groups)


def _derived(statuses) -> Derived:
  leaves = {View: lambda s: {s.leaf}, Derived: lambda s: s.leaves}
  found = [leaves[type(s)](s) for s in statuses if type(s) in leaves]
  return Derived(frozenset().union(*found))


def _parts(shape: tuple[int, ...], *, sizes: tuple[int, ...], axis: int):
  """Parameters of the slices that a split takes."""
  for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
    start, limit = [0] * len(shape), list(shape)
    start[axis], limit[axis] = end - size, end
    yield dict(start_indices=tuple(start), limit_indices=tuple(limit), strides=None)


def _site(eqn, ins: list, path: Path) -> Site | None:
  """The equation as a site, if it is one that `outer_products.py` knows."""
  views = [i for i, s in enumerate(ins) if isinstance(s, View)]
  if len(ins) != 2 or len(views) != 1 or EXAMPLE not in ins:
    return None
  site = Site(path, ins[views[0]], eqn, views[0])
  fed = eqn.outvars if eqn.primitive is p.gather_p else [eqn.invars[site.x], *eqn.outvars]
  if any(v.aval.dtype not in FLOATS for v in fed):
    return None
  known = {
    p.dot_general_p: lambda: True,
    p.conv_general_dilated_p: lambda: site.w == 1 and eqn.params['batch_group_count'] == 1,
    p.gather_p: lambda: site.w == 0 and _looks_up_rows(eqn),
  }
  return site if known.get(eqn.primitive, lambda: False)() else None


def _looks_up_rows(eqn) -> bool:
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


def base_permutation(view: View, rank: int) -> tuple[tuple[Op, ...], tuple[int, ...]]:
  """The view's chain without the transposes at its end, and which dimension of what comes
  before them each of its `rank` dimensions is."""
  chain, permutation = view.chain, tuple(range(rank))
  while chain and chain[-1].primitive is p.transpose_p:
    order = dict(chain[-1].params)['permutation']
    permutation = tuple(order[d] for d in permutation)
    chain = chain[:-1]
  return chain, permutation


def _base_chain(view: View) -> tuple[Op, ...]:
  return base_permutation(view, 0)[0]


def roles(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  """Dimensions of the view that run along batches, along inputs and along outputs.

  Inputs are what activations are contracted with (for a lookup: the row), in ascending
  order of the dimensions before transposes, so that two sites of a group agree.
  """
  params, rank = site.eqn.params, site.eqn.invars[site.w].aval.ndim
  if site.eqn.primitive is p.dot_general_p:
    contracted, batched = (dims[site.w] for dims in params['dimension_numbers'])
  elif site.eqn.primitive is p.gather_p:
    contracted, batched = params['dimension_numbers'].start_index_map, ()
  else:
    spec = params['dimension_numbers'].rhs_spec  # outputs, inputs, space
    contracted, batched = spec[1:], ()
  _, order = base_permutation(site.view, rank)
  by_base = lambda dims: tuple(sorted(dims, key=lambda d: order[d]))
  outputs = set(range(rank)) - set(contracted) - set(batched)
  return by_base(batched), by_base(contracted), by_base(outputs)


def _combine(group: list[Site]) -> bool:
  """Whether the gradients of these sites can be added up as outer products."""
  if len(group) == 1:
    return True
  kinds = {site.eqn.primitive for site in group}
  if p.conv_general_dilated_p in kinds:
    specs = {(s.eqn.params['dimension_numbers'].rhs_spec, s.eqn.params['feature_group_count'])
             for s in group}  # fmt: skip
    return len(kinds) == len(specs) == 1 and len({s.view.chain for s in group}) == 1
  splits = set()
  for site in group:
    _, order = base_permutation(site.view, site.eqn.invars[site.w].aval.ndim)
    batched, inputs, outputs = ([order[d] for d in dims] for dims in roles(site))
    splits.add((tuple(batched), frozenset([tuple(inputs), tuple(outputs)])))
  if len(splits) > 1:
    return False
  rows = {
    base_permutation(s.view, s.eqn.invars[0].aval.ndim)[1][roles(s)[1][0]]
    for s in group
    if s.eqn.primitive is p.gather_p
  }
  return len(rows) <= 1


def through_chain(chain: tuple[Op, ...], x: jax.Array) -> jax.Array:
  """The view of `x` that a chain leads to; slices of scans are stacked in front."""
  if not chain:
    return x
  op, rest = chain[0], chain[1:]
  if op == SLICED_BY_SCAN:
    return jax.vmap(functools.partial(through_chain, rest))(x)
  return through_chain(rest, op.primitive.bind(x, **dict(op.params)))


def _disjoint(chains: list[tuple[Op, ...]], shape: tuple[int, ...]) -> bool:
  """Whether no entry of a parameter of this shape is in two of the views."""
  size = int(np.prod(shape))
  if size > _LARGEST_COMPARED:
    return False
  with jax.ensure_compile_time_eval():
    entries = jnp.arange(size).reshape(shape)
    seen = [np.asarray(through_chain(chain, entries)).ravel() for chain in chains]
  return all(not np.intersect1d(a, b).size for a, b in itertools.combinations(seen, 2))
