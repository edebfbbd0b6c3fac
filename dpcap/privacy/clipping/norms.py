"""Norms of per-example gradients that are never formed, with a proven bound on their rounding.

The gradient of an example by a group of sites is S = sum_t a_t g_t^T over its T tokens (see
`outer_products.py`). With the Gram matrices A_ts = a_t . a_s and B_ts = g_t . g_s,

  |S|^2 = sum_ts A_ts B_ts                                                           (1)

in T^2 (K + O) multiplications, where S itself takes T K O (Goodfellow 2015, arXiv 1510.01799;
Li et al. 2021, arXiv 2110.05679, section 4; Bu et al. 2022, arXiv 2210.00038). Where tokens cancel,
the terms of (1) are far larger than their sum, and rounding may take all of it: a norm that is too
small is a factor that is too large, and a broken guarantee. So each norm comes with a bound.

Claim. In the arithmetic of `rounding.py`, for every a and g, with S exact:

  |S|^2 <= value + error,                                                            (2)
  |computed sum_t w a_t g_t^T - w S| <= w sqrt(rounding) + flushed   for any weight w > 0.   (3)

Lemma. A sum of n numbers x_i, added in any order, is off by at most gamma(n) (sum |x_i| + |sum x_i|) / 2:
each of n - 1 additions rounds a partial sum, and a partial sum is at most the sum of all that is positive
or of all that is negative, whichever is more, which is that half. It counts all additions. In a tree
those that one number meets are fewer, but the partial sums of a level may add up to sum |x_i|, twice
that half: where n counts what a number meets, the error is gamma(n) sum |x_i|.

Proof of (2). Write D^a_ts for a bound on sum_k |a_tk a_sk|: |a_t| |a_s| by Cauchy and Schwarz or,
sharper where entries are uneven, the sum over slices of the axis of the products of the slices' lengths.
A Gram matrix is computed slice by slice, A_ts = sum_i A^i_ts, in products of few terms. By the lemma
slices of n terms are together off by gamma(n) (D^a_ts + sum_i |A^i_ts|) / 2, and slices are added in a known
order, in which each meets m additions: an entry is off by at most

  E^a_ts = gamma(n) (D^a_ts + sum_i |A^i_ts|) / 2 + gamma(m) sum_i |A^i_ts| + gamma(1) D^a_ts + 2 K TINY,

and likewise for B (by nothing for lookups, where A_ts is 0 or 1). Then, entry by entry,

  |A B - fl(A) fl(B)| <= E^a (|fl(B)| + E^b) + |fl(A)| E^b,

and summing fl(A) fl(B) by `tree_sum` over m entries adds gamma(1 + tree_depth(m)) sum |fl(A) fl(B)|.
`error` is the sum of these. All of it is non-negative and computed with errors of relative size
below 1e-3, which a factor of 1 + 1e-3 makes up for (the terms of second order that are left out too).

Proof of (3). Entry (k, o) is the sum of w a_tk g_to. Weighing a_tk and multiplying round each term:
gamma(2) |a_tk g_to|. Adding up, in any order, with other examples at weight 0, is the lemma with T additions:
gamma(T) (sum_t |a_tk g_to| + |S_ko|) / 2. (Where tokens of an entry differ in T, as lookups and products
of one parameter do, it is gamma(T) sum_t |a_tk g_to|.) The norm of the first over all entries follows from

  sum_ko (sum_t |a_tk g_to|)^2 = sum_ts (sum_k |a_tk a_sk|) (sum_o |g_to g_so|) <= sum_ts D^a_ts D^b_ts,

that of the second is |S|, bounded by (2). A weighed entry below TINY may become 0: TINY |g_to| is lost
for each a_tk, or TINY |a_tk| for each g_to where that is weighed, so `flushed` is
TINY sum_t (sqrt(K) |g_t| + sqrt(O) |a_t|). For lookups, T counts the tokens of the same row. What is weighed
in a narrow type rounds to it besides.

What it costs. Both bounds look at what is there, not at the worst that could be: for ordinary
gradients, D^a |B| and |A| D^b sum up to a few |S|^2. Beside the norm, half of `error` over `value` and the
root of `rounding` over the norm come to at most 7e-5 for 2 to 40 random output gradients over inputs that have
much in common, 192 to 768 wide (a test holds that). ROUNDING_MARGIN of `clipped_sum.py` takes up 8e-6 of it;
factors are smaller by the rest. Narrower slices lower it and take more time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping import outer_products
from dpcap.privacy.clipping.outer_products import Products, Rows, dot, tokens_of
from dpcap.privacy.clipping.rounding import (
  TINY,
  at_least_float32,
  gamma,
  rough_sum,
  sum_in_pairs,
  tree_depth,
  tree_sum,
  unit_roundoff,
)
from dpcap.privacy.clipping.sites import Site

# Terms of a Gram entry that are added in an unknown order. Fewer are a tighter bound and more work.
_SLICE = 96

# Slices of a Gram matrix that a program holds at once; further ones are a loop.
_SLICES_AT_ONCE = 8

# Products of rows with rows.
_OF_ROWS = (((1,), (1,)), ((), ()))

# What computing a bound may lose of it.
_SLACK = 1 + 1e-3


class SquaredNorm(NamedTuple):
  """Of the gradient that some sites give an example, in at least float32; see the claim above.

  Attributes:
    value: as computed.
    error: what rounding may have taken from it.
    rounding: square of what rounding may add to the norm of a weighted sum, at weight 1.
    flushed: what a weighted sum may be off by besides, at any weight.
  """

  value: jax.Array
  error: jax.Array
  rounding: jax.Array
  flushed: jax.Array


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
  norms = outer_products.for_each_unit(_of_unit, sites, xs, gs, _temporary_bytes)
  return jax.tree.map(lambda y: sum_in_pairs(list(y.reshape(-1, batch))), norms)


class _Gram(NamedTuple):
  """Some rows of a Gram matrix of T tokens: (R, T) each.

  Attributes:
    value: as computed.
    error: at least what it is off by.
    size: at least the sum of absolute values of each entry's terms.
    lengths: (R,) and (T,) whose products `size` is; None: it is sharper.
    parts: the sum of absolute values of each entry's slices; None: not needed any more.
  """

  value: jax.Array
  error: jax.Array
  size: jax.Array
  lengths: tuple[jax.Array, jax.Array] | None = None
  parts: jax.Array | None = None


class _Tokens(NamedTuple):
  """Tokens of one parameter's batch; of `a` and `row` one may be None.

  Attributes:
    a: (T, K) inputs, zeros for lookups.
    row: (T,) what is looked up, _NO_ROW for others.
    g: (T, O) output gradients.
    adding: (T,) gamma of the outer products that a token's is added up with.
  """

  a: jax.Array | None
  row: jax.Array | None
  g: jax.Array
  adding: jax.Array


_NO_ROW = -1


def _of_unit(parts: Sequence[Products | Rows]) -> SquaredNorm:
  """The claim, for what all sites of a group add to one example's gradient."""
  products = [part for part in parts if isinstance(part, Products)]
  rows = [part for part in parts if isinstance(part, Rows)]
  # Of its two factors an outer product is weighed by the narrower one, in that one's type.
  weighed = [min((y.dtype for y in part), key=lambda d: d.itemsize) for part in parts]
  narrowest = min(weighed, key=lambda d: d.itemsize)
  rounded = unit_roundoff(narrowest) if narrowest.itemsize < 4 else 0.0
  weighing = rounded + gamma(2, narrowest)
  # Sites are added up too.
  adding = lambda terms: gamma(terms + len(parts), narrowest)
  if not rows:
    a, g = outer_products.joined(products)
    each = jnp.full(a.shape[1], adding(a.shape[1]), at_least_float32(g).dtype)
    of_batch = lambda a, g: _of_tokens(_Tokens(a, None, g, each), weighing)
    # Over an axis of one, XLA would copy what loops read.
    return of_batch(a[0], g[0]) if len(a) == 1 else jax.tree.map(tree_sum, jax.vmap(of_batch)(a, g))
  row = jnp.concatenate([part.rows for part in rows])
  g = jnp.concatenate([at_least_float32(part.g) for part in rows])
  # Only tokens of the same row are added up.
  counts = jnp.sum(row[:, None] == row, axis=1)
  roundings = unit_roundoff(g.dtype) * counts
  each = (adding(1) + _SLACK * roundings / (1 - jnp.minimum(roundings, 0.5))).astype(g.dtype)
  if not products:
    return _of_tokens(_Tokens(None, row, g, each), weighing)
  a, h = (y[0] for y in outer_products.joined(products))
  beside = lambda y, z: jnp.concatenate([at_least_float32(y), z])
  tokens = _Tokens(
    beside(a, jnp.zeros((row.size, a.shape[1]))),
    jnp.concatenate([jnp.full(a.shape[0], _NO_ROW, row.dtype), row]),
    beside(h, g),
    # Twice: `_of_tokens` takes half of it, which holds where all tokens meet as many additions.
    2 * beside(jnp.full(a.shape[0], adding(a.shape[0])), each),
  )
  return _of_tokens(tokens, weighing)


def _of_tokens(tokens: _Tokens, weighing: float) -> SquaredNorm:
  """The claim, for one batch of the parameter; rows of the Gram matrices as memory allows."""
  count = tokens.g.shape[0]
  at_once = max(1, min(count, outer_products.MAX_TEMPORARY_BYTES // max(1, _row_bytes(count))))
  blocks = -(-count // at_once)
  summed = gamma(
    1 + tree_depth(at_once * count) + tree_depth(blocks), at_least_float32(tokens.g).dtype
  )

  def flushed(some: _Tokens, gram_a: _Gram, gram_g: _Gram) -> jax.Array:
    def lengths(gram: _Gram, y: jax.Array | None) -> jax.Array:
      if gram.lengths:
        return gram.lengths[0]
      if blocks == 1:
        return jnp.sqrt(gram.size.ravel()[:: count + 1])
      return jnp.ones(len(some.g)) if y is None else _lengths(y) + 1

    inputs = 1 if tokens.a is None else tokens.a.shape[1]
    of_g, of_a = lengths(gram_g, some.g), lengths(gram_a, some.a)
    beside = math.sqrt(inputs) * of_g + math.sqrt(tokens.g.shape[1]) * of_a
    return TINY * tree_sum(beside.astype(tokens.adding.dtype))

  def of_rows(some: _Tokens | None) -> jax.Array:
    gram_a, gram_g = _gram_of_inputs(some, tokens), _gram(some and some.g, tokens.g)
    some = some or tokens
    products = gram_a.value * gram_g.value
    error = (
      gram_a.error * (jnp.abs(gram_g.value) + gram_g.error)
      + jnp.abs(gram_a.value) * gram_g.error
      + summed * jnp.abs(products)
      + 8 * TINY  # of the products here
    )
    share = lambda tokens: weighing + tokens.adding / 2
    if gram_a.lengths and gram_g.lengths:
      both = zip((some, tokens), gram_a.lengths, gram_g.lengths, strict=True)
      rounding = math.prod(tree_sum(share(t) * a * g) for t, a, g in both)
    else:
      rounding = rough_sum(share(some)[:, None] * share(tokens) * gram_a.size * gram_g.size)
    return jnp.stack([tree_sum(products), rough_sum(error), rounding, flushed(some, gram_a, gram_g)])

  if blocks == 1:
    sums = of_rows(None)
  else:
    cut = lambda y: jnp.pad(y, [(0, blocks * at_once - count)] + [(0, 0)] * (y.ndim - 1)).reshape(
      blocks, at_once, *y.shape[1:]
    )
    # What fills up the last block has no gradient.
    sums = jax.vmap(tree_sum, 1)(jax.lax.map(of_rows, jax.tree.map(cut, tokens)))
  value, error, rounding, off = sums
  error *= _SLACK
  of_sums = jnp.max(tokens.adding, initial=0.0) / 2 * jnp.sqrt(jnp.maximum(value + error, 0))
  return SquaredNorm(value, error, _SLACK * jnp.square(jnp.sqrt(rounding) + of_sums), _SLACK * off)


def _gram_of_inputs(some: _Tokens | None, tokens: _Tokens) -> _Gram:
  """Rows `some` of the inputs' Gram matrix; None: all."""
  if tokens.row is None:
    return _gram(some and some.a, tokens.a)
  row = tokens.row if some is None else some.row
  same = ((row[:, None] == tokens.row) & (row[:, None] != _NO_ROW)).astype(tokens.adding.dtype)
  if tokens.a is None:
    return _Gram(same, jnp.zeros_like(same), same)
  gram = _gram(some and some.a, tokens.a)
  a = tokens.a if some is None else some.a
  # A product's inputs at the row that a lookup is one-hot in.
  at_row = lambda a, row: jnp.where(row == _NO_ROW, 0, a[:, jnp.maximum(row, 0)])
  exact = same + at_row(a, tokens.row) + at_row(tokens.a, row).T
  return _Gram(gram.value + exact, gram.error, gram.size + jnp.abs(exact))


def _gram(x: jax.Array | None, y: jax.Array) -> _Gram:
  """All products of x (R, n) with y (T, n), slice by slice; x None: y itself."""
  own = x is None
  x = y if own else x
  n = y.shape[1]
  stride = _SLICE * _SLICES_AT_ONCE
  loops = n // stride if n > stride else 0

  def of_slices(x, y) -> list[jax.Array]:
    slices = max(1, -(-y.shape[1] // _SLICE))
    width = max(1, -(-y.shape[1] // slices))
    cut = lambda z, i: z[:, i : i + width]
    return [dot(cut(x, i), cut(y, i), _OF_ROWS) for i in range(0, max(1, y.shape[1]), width)]

  def own_lengths(value, n):
    # jnp.diagonal would be a gather, which compiles and runs far slower.
    return _length(value.ravel()[:: len(y) + 1], n, gamma(n + 1, y.dtype))

  if not loops:
    slices = of_slices(x, y)
    value, parts = sum_in_pairs(slices), _absolute(slices)
    lengths = (own_lengths(value, n),) * 2 if own else (_lengths(x), _lengths(y))
    size = lengths[0][:, None] * lengths[1]
    error = _error(parts, size, n, -(-n // len(slices)), len(slices).bit_length(), y.dtype)
    return _Gram(value, error, size, lengths, parts)

  def add(i, sums):
    value, size, parts = sums
    cut = lambda z: jax.lax.dynamic_slice_in_dim(z, i * stride, stride, 1)
    slices = of_slices(cut(x), cut(y))
    if own:
      lengths = (jnp.stack([own_lengths(part, _SLICE) for part in slices]),) * 2
    else:
      by_slice = lambda z: _lengths(cut(z).reshape(len(z), _SLICES_AT_ONCE, _SLICE)).T
      lengths = by_slice(x), by_slice(y)
    sizes = dot(*lengths, (((0,), (0,)), ((), ())))
    return value + sum_in_pairs(slices), size + sizes, parts + _absolute(slices)

  # What is left over is less than one round of the loop.
  rest = lambda z: z[:, loops * stride :]
  first = _gram(None if own else rest(x), rest(y))
  start = first.value, first.size, first.parts
  value, size, parts = jax.lax.fori_loop(0, loops, add, start)
  size *= _SLACK
  added = _SLICES_AT_ONCE.bit_length() + loops
  return _Gram(value, _error(parts, size, n, _SLICE, added, y.dtype), size)


def _absolute(slices: list[jax.Array]) -> jax.Array:
  return sum_in_pairs([jnp.abs(part) for part in slices])


def _error(
  parts: jax.Array, size: jax.Array, n: int, terms: int, added: int, dtype
) -> jax.Array:
  """What entries of a Gram matrix are off by: n products in slices of so many terms.

  Absolute values of slices add up to `parts`; each meets so many additions more.
  """
  within = gamma(terms, dtype) / 2 * (size + parts) + gamma(1, dtype) * size
  return within + gamma(added, parts.dtype) * parts + 2 * n * TINY


def _lengths(y: jax.Array) -> jax.Array:
  """At least the lengths of vectors along the last axis."""
  n = y.shape[-1]
  squares = jnp.sum(jnp.square(at_least_float32(y)), axis=-1)
  return _length(squares, n, gamma(n + 1, squares.dtype))


def _length(squares: jax.Array, n: int, error: float) -> jax.Array:
  """At least the length of a vector of `n` numbers whose squares add up to this, up to `error`."""
  return jnp.sqrt(squares * (1 + 2 * error) + n * TINY)


def _row_bytes(tokens: int) -> int:
  """What a row of all that `_of_tokens` holds takes: two values, their parts, sizes, three terms."""
  return 4 * 8 * tokens


def _temporary_bytes(parts: Sequence[Products | Rows]) -> int:
  """What a unit takes beside its tokens."""
  batches = max(part.a.shape[0] if isinstance(part, Products) else 1 for part in parts)
  tokens = tokens_of(parts)
  return batches * tokens * _row_bytes(tokens)
