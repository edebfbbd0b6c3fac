"""Norms and weighted sums of per-example gradients that are never formed.

At a site (see `uses.py`) the gradient of one example is a sum over tokens t of outer
products, sum_t a_t g_t^T, of the site's inputs a (K numbers a token) and its output's
gradients g (O numbers). Its squared norm is

  sum_ts (a_t . a_s) (g_t . g_s)     by Gram matrices, in T^2 (K + O) multiplications
  sum_ko (sum_t a_tk g_to)^2         by forming it, one example and site at a time, in T K O

(Goodfellow 2015, arXiv 1510.01799; Li et al. 2021, arXiv 2110.05679, section 4; Bu et al. 2022,
arXiv 2210.00038); the cheaper is taken. For a lookup of rows a_t is one-hot, and a_t . a_s says
whether two tokens are equal. Sites that share a parameter add up their outer products, so
the tokens of all are taken together. The clipped sum over examples b is
sum_bt (c_b a_bt) g_bt^T: one matrix product, as in plain training.

Arrays of a site carry, before the axes that they have for one example, one axis for each
scan around it and then the batch: (loops..., B, ...).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from dpcap.privacy.uses import Site, base_permutation, roles, through_chain

# Temporaries of the norms stay below this size.
MAX_TEMPORARY_BYTES = 2**26

# Smaller float32 products are zero.
_TINY = float(jnp.finfo(jnp.float32).tiny)


class SquaredNorm(NamedTuple):
  """Of the gradient that some sites give an example; at least float32.

  Attributes:
    value: as computed.
    lost: what rounding may have taken from it: where tokens cancel, a Gram sum adds terms far
      larger than its result.
    rounding: square of what rounding may add to the norm of a weighted sum of the gradients, at
      weight 1. Bounded by the unit roundoff times sum_t |a_t| |g_t|, which is far more than
      the norm where tokens cancel.
  """

  value: jax.Array
  lost: jax.Array
  rounding: jax.Array


class _Products(NamedTuple):
  """Outer products of T tokens, for each of the parameter's Q batches: (Q, T, K), (Q, T, O)."""

  a: jax.Array
  g: jax.Array


class _Rows(NamedTuple):
  """Lookups of T rows (T,), whole numbers, and the gradients of what was found (T, O)."""

  rows: jax.Array
  g: jax.Array


def squared_norm(
  sites: Sequence[Site], xs: Sequence[jax.Array], gs: Sequence[jax.Array]
) -> SquaredNorm:
  """Squared norms (B,) of what a group of sites together adds to each example's gradient.

  Args:
    sites: a group, which shares a parameter (`Uses.groups`).
    xs: what each site was fed, (loops..., B, ...).
    gs: the gradient of each site's output, (loops..., B, ...).
  """
  batch = xs[0].shape[len(sites[0].view.loops)]
  # Examples, once for each slice of the parameter that a scan takes: slices' squares add up.
  units = [(_by_unit(s, x), _by_unit(s, g)) for s, x, g in zip(sites, xs, gs, strict=True)]

  def of_unit(unit) -> SquaredNorm:
    return _squared_norm_of_unit(sites, [_outer_products(s, *xg) for s, xg in zip(sites, unit)])

  first = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), units)
  at_once = max(1, MAX_TEMPORARY_BYTES // _temporary_bytes(sites, first))
  if at_once >= units[0][0].shape[0]:
    norms = jax.vmap(of_unit)(units)
  else:
    norms = jax.lax.map(of_unit, units, batch_size=at_once)
  return jax.tree.map(lambda y: jnp.sum(y.reshape(-1, batch), axis=0), norms)


def weighted_sum(
  site: Site, x: jax.Array, g: jax.Array, weights_B: jax.Array, like: jax.Array
) -> jax.Array:
  """sum_b weights_b (gradient of example b by this site), shaped as the parameter `like`.

  `x` and `g` are as in `squared_norm`. Sums are taken in at least float32; where `x` and
  `g` have less, the weighted one of the two is rounded to their type.
  """
  gradient = functools.partial(weighted_view, site)
  x, g = _by_slice(site, x), _by_slice(site, g)
  slices = sum(loop.sliced for loop in site.view.loops)
  for _ in range(slices):
    gradient = jax.vmap(gradient, (0, 0, None))
  # Iterations that share the parameter count as further examples.
  view = gradient(x, g, jnp.repeat(weights_B, x.shape[slices] // weights_B.size))
  leaf = jax.ShapeDtypeStruct(like.shape, view.dtype)
  return jax.linear_transpose(functools.partial(through_chain, site.view.chain), leaf)(view)[0]


def weighted_view(site: Site, x_B: jax.Array, g_B: jax.Array, weights_B: jax.Array) -> jax.Array:
  """`weighted_sum` with respect to the parameter's view, for a site in no loop."""
  if site.eqn.primitive is not p.dot_general_p:
    dtype = jnp.promote_types(g_B.dtype, jnp.float32)
    x_B = x_B.astype(dtype) if jnp.issubdtype(x_B.dtype, jnp.floating) else x_B
    operation = lambda w: jax.vmap(lambda x: site.apply(x, w, dtype))(x_B)
    view = jax.ShapeDtypeStruct(site.eqn.invars[site.w].aval.shape, dtype)
    return jax.linear_transpose(operation, view)(_weigh(g_B, weights_B, dtype))[0]
  if x_B.size < g_B.size:
    x_B = _weigh(x_B, weights_B, x_B.dtype)
  else:
    g_B = _weigh(g_B, weights_B, g_B.dtype)
  x_axes, g_axes = _dot_axes(site)
  shift = lambda axes: [1 + a for a in axes]
  contracted = [0, *shift(x_axes.free)], [0, *shift(g_axes.free)]
  view = _dot(x_B, g_B, (contracted, (shift(x_axes.batch), shift(g_axes.batch))))
  # A product's axes are its batches, then the others of x and of g in their own order.
  batch, inputs, outputs = roles(site)
  by_axis = lambda dims, axes: [d for _, d in sorted(zip(axes, dims, strict=True))]
  order = [*batch, *by_axis(inputs, x_axes.bound), *by_axis(outputs, g_axes.bound)]
  return view.transpose(sorted(range(len(order)), key=lambda i: order[i]))


def settled(ys):
  """A tree of sites' arrays, those of less than 32 bits brought to values that stay.

  XLA may leave out a rounding to a narrow type in one place and not in another: the sum
  would then be of other values than the norms. What is left is bfloat16 or wider; weights
  would take float16 below its smallest numbers. Rows counted in bytes become int32: XLA
  adds up their gradients in wrong places.
  """

  def settle(y: jax.Array) -> jax.Array:
    if y.dtype.itemsize >= 4:
      return y
    if jnp.issubdtype(y.dtype, jnp.integer):
      return y.astype(jnp.int32)
    info = jnp.finfo(y.dtype)
    wide = jax.lax.reduce_precision(y.astype(jnp.float32), info.nexp, info.nmant)
    return wide.astype(y.dtype) if y.dtype == jnp.bfloat16 else wide

  return jax.tree.map(settle, ys)


def _weigh(y_B: jax.Array, weights_B: jax.Array, dtype) -> jax.Array:
  """weights_b y_b, computed in at least float32, of type `dtype`."""
  wide = at_least_float32(y_B)
  return (wide * weights_B.reshape(weights_B.shape + (1,) * (y_B.ndim - 1))).astype(dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` in float32, or in its own type if that has more bits."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Axes of an array at a product, by what they run along.
class _Axes(NamedTuple):
  batch: list[int]
  free: list[int]  # tokens
  bound: list[int]  # inputs of x, outputs of g


def _dot_axes(site: Site) -> tuple[_Axes, _Axes]:
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
    _Axes([x_of[d] for d in batch], x_free, [x_of[d] for d in inputs]),
    _Axes(
      [parallel[site.w].index(d) for d in batch],
      [first_x + i for i in range(len(x_free))],
      [first_w + w_free.index(d) for d in outputs],
    ),
  )


def _dot(a: jax.Array, b: jax.Array, numbers) -> jax.Array:
  """A product in at least float32, also where accelerators would round float32 operands."""
  operands = jnp.promote_types(a.dtype, b.dtype)
  dtype = jnp.promote_types(operands, jnp.float32)

  def product(a, b, operands=operands):
    return jax.lax.dot_general(
      a.astype(operands),
      b.astype(operands),
      numbers,
      precision='highest' if operands.itemsize >= 4 else None,
      preferred_element_type=dtype,
    )

  if operands == dtype:
    return product(a, b)
  # XLA has no such product of narrow types on CPU, for some shapes.
  wide = functools.partial(product, operands=dtype)
  return jax.lax.platform_dependent(a, b, cpu=wide, default=product)


def _split_loops(site: Site, y: jax.Array) -> tuple[jax.Array, int]:
  """(slices of the parameter..., B, other loops..., ...), and the number of slicing loops."""
  loops = site.view.loops
  sliced = [i for i, loop in enumerate(loops) if loop.sliced]
  others = [i for i, loop in enumerate(loops) if not loop.sliced]
  order = [*sliced, len(loops), *others]
  return jnp.moveaxis(y, order, range(len(order))), len(sliced)


def _by_unit(site: Site, y: jax.Array) -> jax.Array:
  """(loops..., B, ...) -> (slices * B, other loops, ...)."""
  y, sliced = _split_loops(site, y)
  units, first = y.shape[: sliced + 1], len(site.view.loops) + 1
  return y.reshape(math.prod(units), math.prod(y.shape[sliced + 1 : first]), *y.shape[first:])


def _by_slice(site: Site, y: jax.Array) -> jax.Array:
  """(loops..., B, ...) -> (slices..., B * other loops, ...)."""
  y, sliced = _split_loops(site, y)
  first = len(site.view.loops) + 1
  return y.reshape(*y.shape[:sliced], math.prod(y.shape[sliced:first]), *y.shape[first:])


def _outer_products(site: Site, x: jax.Array, g: jax.Array) -> _Products | _Rows:
  """What one unit (other loops, ...) of a site adds up, its tokens along one axis."""
  if site.eqn.primitive is p.dot_general_p:
    x_axes, g_axes = _dot_axes(site)
    return _Products(_tokens(x, x_axes), _tokens(g, g_axes))
  if site.eqn.primitive is p.gather_p:
    return _lookups(site, x, g)
  return jax.tree.map(
    lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[-1]),
    jax.vmap(functools.partial(_patches, site))(x, g),
  )


def _tokens(y: jax.Array, axes: _Axes) -> jax.Array:
  """(loops, ...) -> (Q, T, bound)."""
  sizes = [math.prod(y.shape[1 + a] for a in group) for group in axes]
  y = y.transpose([1 + a for a in axes.batch] + [0] + [1 + a for a in axes.free + axes.bound])
  return y.reshape(sizes[0], -1 if y.size else 0, sizes[2])


def _lookups(site: Site, x: jax.Array, g: jax.Array) -> _Rows:
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
  return _Rows(jnp.clip(rows, 0, count - 1), g)


def _patches(site: Site, x: jax.Array, g: jax.Array) -> _Products:
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
  return _Products(by_group(patches), by_group(g))


def _squared_norm_of_unit(sites: Sequence[Site], parts: Sequence[_Products | _Rows]) -> SquaredNorm:
  """Of the sum of all outer products of one unit, from the parts of each site."""
  inputs = _group_inputs(sites)
  # A transposed use of the parameter has its inputs where the others have outputs.
  products = [
    part if _base_inputs(site) == inputs else _Products(part.g, part.a)
    for site, part in zip(sites, parts, strict=True)
    if isinstance(part, _Products)
  ]
  rows = [part for part in parts if isinstance(part, _Rows)]
  dtype = functools.reduce(jnp.promote_types, [part.g.dtype for part in parts], jnp.float32)
  value, lost, reach = jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((1,), dtype)
  gram = bool(rows)
  if products:
    a, g = (jnp.concatenate(ys, axis=1) for ys in zip(*products))
    gram |= _gram_is_cheaper(a.shape[1], a.shape[2], g.shape[2])
    values, lengths_a, lengths_g = jax.vmap(_product_norm)(a, g)
    value += jnp.sum(values)
    reach = jnp.sum(lengths_a * lengths_g, axis=1)
    if gram:
      # Products below the smallest number, which the other Gram matrix makes count.
      vanished = lambda y, others: y.shape[2] * jnp.square(jnp.sum(others, axis=1))
      lost += _TINY * jnp.sum(vanished(a, lengths_g) + vanished(g, lengths_a))
  if rows:
    row, h = (jnp.concatenate(ys) for ys in zip(*rows))
    h = at_least_float32(h)
    value += _lookup_norm(row, h)
    reach += jnp.sum(_row_norms(h))
  if products and rows:
    value += 2 * jnp.sum(a[0][:, row] * _dot(g[0], h, (((1,), (1,)), ((), ()))))
    lost += 2 * _TINY * h.size * jnp.sum(lengths_a)
  squared_reach = jnp.sum(jnp.square(reach))
  roundoff = lambda dtype: float(jnp.finfo(dtype).eps) / 2
  # Weighing rounds once, to the type of what is weighed, and summing a few times.
  narrow = [min((y.dtype for y in part), key=lambda d: d.itemsize) for part in products]
  once = max([roundoff(d) for d in narrow if d.itemsize < 4], default=0.0)
  # A Gram sum rounds each of its T^2 terms; their errors do not all point one way.
  tokens = sum(part.g.shape[-2] for part in parts)
  terms = 1 + 8 / max(tokens, 1) if gram else 0
  return SquaredNorm(
    value=value,
    lost=lost + terms * roundoff(dtype) * squared_reach,
    rounding=(once + 4 * roundoff(dtype)) ** 2 * squared_reach,
  )


def _gram_is_cheaper(tokens: int, inputs: int, outputs: int) -> bool:
  return tokens * (inputs + outputs) < inputs * outputs


def _product_norm(a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """|a^T g|^2, and |a_t| and |g_t| (T,), for a (T, K) and g (T, O)."""
  tokens, inputs = a.shape
  outputs = g.shape[1]
  if not _gram_is_cheaper(tokens, inputs, outputs):
    over_tokens = (((0,), (0,)), ((), ()))
    value = _sum_in_blocks(
      lambda columns: jnp.sum(jnp.square(_dot(a, columns.T, over_tokens))), [g.T], inputs
    )
    return value, _row_norms(a), _row_norms(g)
  gram = lambda x, y: _dot(x, y, (((1,), (1,)), ((), ())))
  if _rows_in_a_block(tokens) < tokens:
    value = _sum_in_blocks(lambda x, y: jnp.sum(gram(x, a) * gram(y, g)), [a, g], tokens)
    return value, _row_norms(a), _row_norms(g)
  gram_a, gram_g = gram(a, a), gram(g, g)
  # jnp.diagonal would be a gather, which compiles and runs far slower.
  lengths = lambda gram, size: _length(gram.ravel()[:: tokens + 1], size)
  return jnp.sum(gram_a * gram_g), lengths(gram_a, inputs), lengths(gram_g, outputs)


def _lookup_norm(rows: jax.Array, g: jax.Array) -> jax.Array:
  """Squared norm of the (rows x O) matrix to whose rows g (T, O) is added."""

  def block(block_rows, block_g):
    gram = _dot(block_g, g, (((1,), (1,)), ((), ())))
    return jnp.sum(jnp.where(block_rows[:, None] == rows, gram, 0))

  return _sum_in_blocks(block, [rows, g], rows.size)


def _row_norms(y: jax.Array) -> jax.Array:
  return _length(jnp.sum(jnp.square(at_least_float32(y)), axis=-1), y.shape[-1])


def _length(squares: jax.Array, size: int) -> jax.Array:
  """At least the length of a vector of `size` numbers whose squares add up to this."""
  return jnp.sqrt(squares + size * _TINY)


def _rows_in_a_block(row_entries: int) -> int:
  """How many rows of two matrices of this width are within the temporary memory."""
  return max(1, MAX_TEMPORARY_BYTES // (2 * 4 * max(row_entries, 1)))


def _sum_in_blocks(f, ys: list[jax.Array], row_entries: int) -> jax.Array:
  """Sum of f over blocks of rows of all `ys`; f makes rows of `row_entries` of them.

  The last block is filled up with rows of zeros: f must give 0 for them.
  """
  rows = ys[0].shape[0]
  block = _rows_in_a_block(row_entries)
  if block >= rows:
    return f(*ys)
  count = -(-rows // block)
  fill = lambda y: jnp.pad(y, [(0, count * block - rows)] + [(0, 0)] * (y.ndim - 1))
  blocks = [fill(y).reshape(count, block, *y.shape[1:]) for y in ys]
  return jnp.sum(jax.lax.map(lambda block: f(*block), blocks))


def _temporary_bytes(sites: Sequence[Site], unit) -> int:
  """What the squared norm of one unit takes, but for what is summed in blocks anyway."""
  parts = jax.eval_shape(
    lambda unit: [_outer_products(s, *xg) for s, xg in zip(sites, unit, strict=True)], unit
  )
  tokens = sum(part.g.shape[-2] for part in parts)
  sizes = [math.prod(y.shape) for part in parts for y in part if len(sites) > 1]
  for site, part in zip(sites, parts, strict=True):
    if site.eqn.primitive is p.conv_general_dilated_p:
      sizes.append(math.prod(part.a.shape))
  if isinstance(parts[0], _Products):
    batches, _, inputs = parts[0].a.shape
    outputs = parts[0].g.shape[2]
    gram = _gram_is_cheaper(tokens, inputs, outputs)
    sizes.append(batches * (2 * tokens**2 if gram else inputs * outputs))
  else:
    sizes.append(2 * tokens**2)
  return 4 * max(1, min(sum(sizes), MAX_TEMPORARY_BYTES))


def _base_inputs(site: Site) -> tuple[int, ...]:
  """The parameter's dimensions along the site's inputs, as numbered before transposes."""
  order = base_permutation(site.view, site.eqn.invars[site.w].aval.ndim)[1]
  return tuple(order[d] for d in roles(site)[1])


def _group_inputs(sites: Sequence[Site]) -> tuple[int, ...]:
  """The inputs of a group: the rows that are looked up, or else the first site's."""
  lookups = [site for site in sites if site.eqn.primitive is p.gather_p]
  return _base_inputs((lookups or sites)[0])
