"""What a site adds to its parameter's gradient, as outer products.

At a site (see `uses.py`) the gradient of one example is a sum over tokens t of outer products,
sum_t a_t g_t^T, of the site's inputs a_t (K numbers) and its output's gradients g_t (O numbers),
once for each of Q batches of the parameter. For a lookup of rows a_t is one-hot. Sites that share
a parameter add up their outer products: the tokens of all are taken together.

Arrays of a site carry, before the axes that they have for one example, one axis for each
scan around it and then the batch: (loops..., B, ...).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from dpcap.privacy.clipping.rounding import dot
from dpcap.privacy.clipping.sites import Site, base_roles, roles

# Temporaries of one step of norms or sums stay below this size.
MAX_TEMPORARY_BYTES = 2**26


class Products(NamedTuple):
  """Outer products of T tokens, for each of the parameter's Q batches: (Q, T, K), (Q, T, O)."""

  a: jax.Array
  g: jax.Array


class Rows(NamedTuple):
  """Lookups of T rows (T,), whole numbers, and the gradients of what was found (T, O)."""

  rows: jax.Array
  g: jax.Array


def in_safe_type(y: jax.Array) -> jax.Array:
  """The same values of a site's array in a type that norms and sums can be computed from.

  XLA may leave out a rounding to a narrow type in one place and not in another; here it is made.
  What is left is bfloat16 or wider, as weights would take float16 below its smallest numbers. Rows
  counted in bytes become int32: XLA adds up their gradients in wrong places.
  """
  if y.dtype.itemsize >= 4:
    return y
  if jnp.issubdtype(y.dtype, jnp.integer):
    return y.astype(jnp.int32)
  info = jnp.finfo(y.dtype)
  wide = jax.lax.reduce_precision(y.astype(jnp.float32), info.nexp, info.nmant)
  return wide.astype(y.dtype) if y.dtype == jnp.bfloat16 else wide


def is_formed(sites: Sequence[Site], xs: Sequence[jax.Array], gs: Sequence[jax.Array]) -> bool:
  """Whether a group's gradients of single examples are smaller than what they are made of.

  Then they are formed and kept in place of it (`formed`); arrays or their shapes will do.
  """
  parts = _parts_of_unit(sites, xs, gs)
  if not all(isinstance(part, Products) for part in parts):
    return False
  _, _, inputs = parts[0].a.shape
  outputs = parts[0].g.shape[2]
  return tokens_of(parts) * (inputs + outputs) >= inputs * outputs


def formed(sites: Sequence[Site], xs: Sequence[jax.Array], gs: Sequence[jax.Array]) -> jax.Array:
  """What a group without lookups adds to each example's gradient: (B, slices..., Q, K, O)."""

  def of_unit(parts: list[Products]) -> jax.Array:
    a, g = joined(parts)
    return dot(a, g, (((1,), (1,)), ((0,), (0,))))

  units = for_each_unit(of_unit, sites, xs, gs)
  slices = [loop.length for loop in sites[0].view.loops if loop.sliced]
  batch = xs[0].shape[len(sites[0].view.loops)]
  return jnp.moveaxis(units.reshape(*slices, batch, *units.shape[1:]), len(slices), 0)


def for_each_unit(
  function: Callable[[list[Products | Rows]], jax.Array],
  sites: Sequence[Site],
  xs: Sequence[jax.Array],
  gs: Sequence[jax.Array],
  temporary_bytes: Callable[[list[Products | Rows]], int] = lambda parts: 0,
):
  """`function` of each unit's outer products, those of every site: results (slices * B, ...).

  A unit is one example's share of one slice of the parameter that a scan takes: slices do not
  overlap, so that their squares add up. As many are taken at a time as memory allows.

  Args:
    function: of one unit's parts, in the order of `sites`.
    sites: a group, which shares a parameter (`Uses.groups`).
    xs: what each site was fed, (loops..., B, ...).
    gs: the gradient of each site's output, (loops..., B, ...).
    temporary_bytes: of shapes of a unit's parts: what `function` takes beyond them.
  """
  units = [(_by_unit(s, x), _by_unit(s, g)) for s, x, g in zip(sites, xs, gs, strict=True)]
  of_unit = lambda unit: function(_parts(sites, unit))
  parts = _parts_of_unit(sites, xs, gs)
  sizes = [4 * math.prod(y.shape) for part in parts for y in part if len(sites) > 1]
  for site, part in zip(sites, parts, strict=True):
    if site.eqn.primitive is primitives.conv_general_dilated_p:
      sizes.append(4 * math.prod(part.a.shape))
  taken = min(max(4, sum(sizes) + temporary_bytes(parts)), MAX_TEMPORARY_BYTES)
  at_once = max(1, MAX_TEMPORARY_BYTES // taken)
  if at_once >= units[0][0].shape[0]:
    return jax.vmap(of_unit)(units)
  return jax.lax.map(of_unit, units, batch_size=at_once)


def joined(parts: Sequence[Products]) -> Products:
  """The tokens of all sites together."""
  return Products(*(jnp.concatenate(ys, axis=1) for ys in zip(*parts)))


def tokens_of(parts: Sequence[Products | Rows]) -> int:
  """How many tokens a unit has; parts or their shapes."""
  return sum(part.g.shape[-2] for part in parts)


class Axes(NamedTuple):
  """Axes of an array at a product, by what they run along."""

  batch: list[int]
  free: list[int]  # tokens
  bound: list[int]  # inputs of x, outputs of g


def dot_axes(site: Site) -> tuple[Axes, Axes]:
  """Axes of x and of g for one example, the bound ones in the order of `roles(site)`."""
  batch, inputs, outputs = roles(site)
  contracted, parallel = site.eqn.params['dimension_numbers']
  x_of = dict(zip(contracted[site.w] + parallel[site.w], contracted[site.x] + parallel[site.x]))
  x_free = [d for d in range(site.eqn.invars[site.x].aval.ndim) if d not in x_of.values()]
  # A product's axes are its batches, what is free of the left operand, then of the right.
  w_free = sorted(outputs)
  first_x = len(batch) + (0 if site.w else len(w_free))
  first_w = len(batch) + (len(x_free) if site.w else 0)
  return (
    Axes([x_of[d] for d in batch], x_free, [x_of[d] for d in inputs]),
    Axes(
      [parallel[site.w].index(d) for d in batch],
      [first_x + i for i in range(len(x_free))],
      [first_w + w_free.index(d) for d in outputs],
    ),
  )


def split_loops(site: Site, y: jax.Array) -> tuple[jax.Array, int]:
  """(slices of the parameter..., B, other loops..., ...), and the number of slicing loops."""
  loops = site.view.loops
  sliced = [i for i, loop in enumerate(loops) if loop.sliced]
  others = [i for i, loop in enumerate(loops) if not loop.sliced]
  order = [*sliced, len(loops), *others]
  return jnp.moveaxis(y, order, range(len(order))), len(sliced)


def _parts_of_unit(sites, xs, gs) -> list[Products | Rows]:
  """The shapes of one unit's parts."""

  def first(*arrays):
    units = [(_by_unit(s, x), _by_unit(s, g)) for s, x, g in zip(sites, *arrays, strict=True)]
    return _parts(sites, [(x[0], g[0]) for x, g in units])

  return jax.eval_shape(first, list(xs), list(gs))


def _parts(sites, unit) -> list[Products | Rows]:
  """One unit's outer products, those of all sites in the coordinates of the same one."""
  # Rows that are looked up are inputs.
  lookups = [site for site in sites if site.eqn.primitive is primitives.gather_p]
  inputs = base_roles((lookups or sites)[0]).inputs
  parts = [_outer_products(site, x, g) for site, (x, g) in zip(sites, unit, strict=True)]
  # A transposed use of the parameter has its inputs where the others have outputs.
  return [
    part if base_roles(site).inputs == inputs else Products(part.g, part.a)
    for site, part in zip(sites, parts)
  ]


def _by_unit(site: Site, y: jax.Array) -> jax.Array:
  """(loops..., B, ...) -> (slices * B, other loops, ...)."""
  y, sliced = split_loops(site, y)
  units, first = y.shape[: sliced + 1], len(site.view.loops) + 1
  return y.reshape(math.prod(units), math.prod(y.shape[sliced + 1 : first]), *y.shape[first:])


def _outer_products(site: Site, x: jax.Array, g: jax.Array) -> Products | Rows:
  """What one unit (other loops, ...) of a site adds up, its tokens along one axis."""
  if site.eqn.primitive is primitives.gather_p:
    return _lookups(site, x, g)
  if site.eqn.primitive is primitives.dot_general_p:
    x_axes, g_axes = dot_axes(site)
    return Products(_tokens(x, x_axes), _tokens(g, g_axes))
  return jax.tree.map(
    lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[-1]),
    jax.vmap(functools.partial(_patches, site))(x, g),
  )


def _tokens(y: jax.Array, axes: Axes) -> jax.Array:
  """(loops, ...) -> (Q, T, bound)."""
  sizes = [math.prod(y.shape[1 + a] for a in group) for group in axes]
  y = y.transpose([1 + a for a in axes.batch] + [0] + [1 + a for a in axes.free + axes.bound])
  return y.reshape(sizes[0], -1 if y.size else 0, sizes[2])


def _lookups(site: Site, x: jax.Array, g: jax.Array) -> Rows:
  numbers = site.eqn.params['dimension_numbers']
  (_, (row_axis,), outputs) = roles(site)
  offset_of = dict(zip(sorted(outputs), numbers.offset_dims))
  offsets = [1 + offset_of[d] for d in outputs]
  g = jnp.moveaxis(g, offsets, range(g.ndim - len(offsets), g.ndim))
  rows = x.reshape(-1)
  g = g.reshape(rows.size, math.prod(g.shape[g.ndim - len(offsets) :]))
  count = site.eqn.invars[site.w].aval.shape[row_axis]
  if site.eqn.params['mode'] != jax.lax.GatherScatterMode.CLIP:
    # A row that does not exist has no gradient, whatever is found there.
    g = jnp.where(((rows >= 0) & (rows < count))[:, None], g, 0)
  return Rows(jnp.clip(rows, 0, count - 1), g)


def _patches(site: Site, x: jax.Array, g: jax.Array) -> Products:
  """The convolution of one example as a product with its patches, one per channel group."""
  params = site.eqn.params
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  kernel = site.eqn.invars[site.w].aval.shape
  x, g = x.transpose(numbers.lhs_spec), g.transpose(numbers.out_spec)
  patches = jax.lax.conv_general_dilated_patches(
    x,
    [kernel[d] for d in numbers.rhs_spec[2:]],
    params['window_strides'],
    params['padding'],
    params['lhs_dilation'],
    params['rhs_dilation'],
    precision=jax.lax.Precision.HIGHEST,
  )
  by_group = lambda y: jnp.moveaxis(
    y.reshape(y.shape[0], groups, y.shape[1] // groups, -1), (1, 0, 3, 2), (0, 1, 2, 3)
  ).reshape(groups, -1, y.shape[1] // groups)
  return Products(by_group(patches), by_group(g))
