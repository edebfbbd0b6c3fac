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

Proof of (2). By `gram.py` an entry of a Gram matrix is off by at most its `error`, E^a_ts and
E^b_ts (for lookups, where A_ts is 0 or 1, by nothing), and `size`, D^a_ts, is at least
sum_k |a_tk a_sk|. Then, entry by entry,

  |A B - fl(A) fl(B)| <= E^a (|fl(B)| + E^b) + |fl(A)| E^b,

and summing fl(A) fl(B) by `tree_sum` over m entries adds

  gamma(1 + tree_depth(m)) sum |fl(A) fl(B)|.

`error` is the sum of these. All of it is non-negative and computed with errors of relative size
below 1e-3, which a factor of 1 + 1e-3 makes up for (the terms of second order that are left out
too).

Proof of (3). Entry (k, o) is the sum of w a_tk g_to. Weighing a_tk and multiplying round each term:
gamma(2) |a_tk g_to|. Adding up, in any order, with other examples at weight 0, is the lemma of
`rounding.py` with T additions: gamma(T) (sum_t |a_tk g_to| + |S_ko|) / 2. (Where tokens of an entry
differ in T, as lookups and products of one parameter do, it is gamma(T) sum_t |a_tk g_to|.) The
norm of the first over all entries follows from

  sum_ko (sum_t |a_tk g_to|)^2 = sum_ts (sum_k |a_tk a_sk|) (sum_o |g_to g_so|)
                              <= sum_ts D^a_ts D^b_ts,

that of the second is |S|, bounded by (2). A weighed entry below TINY may become 0: TINY |g_to| is
lost for each a_tk, or TINY |a_tk| for each g_to where that is weighed, so `flushed` is

  TINY sum_t (sqrt(K) |g_t| + sqrt(O) |a_t|).

For lookups, T counts the tokens of the same row. What is weighed in a narrow type rounds to it
besides.

What it costs. Both bounds look at what is there, not at the worst that could be: for ordinary
gradients, D^a |B| and |A| D^b sum up to a few |S|^2. Beside the norm, half of `error` over `value`
and the root of `rounding` over the norm come to at most 7e-5 for 2 to 40 random output gradients
over inputs that have much in common, 192 to 768 wide (a test holds that). ROUNDING_MARGIN of
`clipped_sum.py` takes up 8e-6 of it; factors are smaller by the rest. Narrower slices (`gram.py`)
lower it and take more time.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping import outer_products
from dpcap.privacy.clipping.gram import Gram, gram_matrix, vector_lengths
from dpcap.privacy.clipping.outer_products import Products, Rows, tokens_of
from dpcap.privacy.clipping.rounding import (
  SLACK,
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
  return _of_tokens(_with_lookups(products, rows, adding), weighing)


def _with_lookups(
  products: Sequence[Products], rows: Sequence[Rows], adding: Callable[[int], float]
) -> _Tokens:
  """The tokens of lookups and, of the same table, of products."""
  row = jnp.concatenate([part.rows for part in rows])
  g = jnp.concatenate([at_least_float32(part.g) for part in rows])
  # Only tokens of the same row are added up.
  counts = jnp.sum(row[:, None] == row, axis=1)
  roundings = unit_roundoff(g.dtype) * counts
  each = (adding(1) + SLACK * roundings / (1 - jnp.minimum(roundings, 0.5))).astype(g.dtype)
  if not products:
    return _Tokens(None, row, g, each)
  a, h = (y[0] for y in outer_products.joined(products))
  beside = lambda y, z: jnp.concatenate([at_least_float32(y), z])
  return _Tokens(
    beside(a, jnp.zeros((row.size, a.shape[1]))),
    jnp.concatenate([jnp.full(a.shape[0], _NO_ROW, row.dtype), row]),
    beside(h, g),
    # Twice: `_of_tokens` takes half of it, which holds where all tokens meet as many additions.
    2 * beside(jnp.full(a.shape[0], adding(a.shape[0])), each),
  )


def _of_tokens(tokens: _Tokens, weighing: float) -> SquaredNorm:
  """The claim, for one batch of the parameter; rows of the Gram matrices as memory allows."""
  count = tokens.g.shape[0]
  at_once = max(1, min(count, outer_products.MAX_TEMPORARY_BYTES // max(1, _row_bytes(count))))
  blocks = -(-count // at_once)
  additions = 1 + tree_depth(at_once * count) + tree_depth(blocks)
  summing = gamma(additions, at_least_float32(tokens.g).dtype)
  of_some = functools.partial(_of_some, tokens=tokens, weighing=weighing, summing=summing)
  if blocks == 1:
    sums = of_some(None)
  else:
    cut = lambda y: jnp.pad(y, [(0, blocks * at_once - count)] + [(0, 0)] * (y.ndim - 1)).reshape(
      blocks, at_once, *y.shape[1:]
    )
    # What fills up the last block has no gradient.
    sums = jax.vmap(tree_sum, 1)(jax.lax.map(of_some, jax.tree.map(cut, tokens)))
  value, error, rounding, flushed = sums
  error *= SLACK
  adding = jnp.max(tokens.adding, initial=0.0) / 2 * jnp.sqrt(jnp.maximum(value + error, 0))
  rounding = SLACK * jnp.square(jnp.sqrt(rounding) + adding)
  return SquaredNorm(value, error, rounding, SLACK * flushed)


def _of_some(
  some: _Tokens | None, *, tokens: _Tokens, weighing: float, summing: float
) -> jax.Array:
  """What the Gram matrices of some tokens with all add up to; None: of all.

  The value and the error of (2), the square of the first norm of (3), and what is flushed: (4,).
  """
  gram_a, gram_g = _gram_of_inputs(some, tokens), gram_matrix(some and some.g, tokens.g)
  own = some or tokens
  products = gram_a.value * gram_g.value
  error = (
    gram_a.error * (jnp.abs(gram_g.value) + gram_g.error)
    + jnp.abs(gram_a.value) * gram_g.error
    + summing * jnp.abs(products)
    + 8 * TINY  # of the products here
  )
  # Half of what is added: the other half is of the sum itself.
  share = lambda tokens: weighing + tokens.adding / 2
  if gram_a.lengths and gram_g.lengths:
    both = zip((own, tokens), gram_a.lengths, gram_g.lengths, strict=True)
    rounding = math.prod(tree_sum(share(t) * a * g) for t, a, g in both)
  else:
    rounding = rough_sum(share(own)[:, None] * share(tokens) * gram_a.size * gram_g.size)
  flushed = _flushed(some, tokens, gram_a, gram_g)
  return jnp.stack([tree_sum(products), rough_sum(error), rounding, flushed])


def _flushed(some: _Tokens | None, tokens: _Tokens, gram_a: Gram, gram_g: Gram) -> jax.Array:
  """What is flushed of some tokens, from the lengths of their inputs and output gradients."""
  own = some or tokens

  def lengths(gram: Gram, y: jax.Array | None) -> jax.Array:
    if gram.lengths:
      return gram.lengths[0]
    if some is None:
      return jnp.sqrt(gram.size.ravel()[:: len(tokens.g) + 1])
    return jnp.ones(len(own.g)) if y is None else vector_lengths(y) + 1

  inputs = 1 if tokens.a is None else tokens.a.shape[1]
  of_g, of_a = lengths(gram_g, own.g), lengths(gram_a, own.a)
  each = math.sqrt(inputs) * of_g + math.sqrt(tokens.g.shape[1]) * of_a
  return TINY * tree_sum(each.astype(tokens.adding.dtype))


def _gram_of_inputs(some: _Tokens | None, tokens: _Tokens) -> Gram:
  """The inputs' Gram matrix of some tokens with all; None: of all."""
  if tokens.row is None:
    return gram_matrix(some and some.a, tokens.a)
  own = some or tokens
  is_same = (own.row[:, None] == tokens.row) & (own.row[:, None] != _NO_ROW)
  same = is_same.astype(tokens.adding.dtype)
  if tokens.a is None:
    return Gram(same, jnp.zeros_like(same), same)
  gram = gram_matrix(some and some.a, tokens.a)
  # A product's inputs at the row that a lookup is one-hot in.
  at_row = lambda a, row: jnp.where(row == _NO_ROW, 0, a[:, jnp.maximum(row, 0)])
  exact = same + at_row(own.a, tokens.row) + at_row(tokens.a, own.row).T
  return Gram(gram.value + exact, gram.error, gram.size + jnp.abs(exact))


def _row_bytes(tokens: int) -> int:
  """What a row of all that `_of_some` holds takes: two values, their parts, sizes, three terms."""
  return 4 * 8 * tokens


def _temporary_bytes(parts: Sequence[Products | Rows]) -> int:
  """What a unit takes beside its tokens."""
  batches = max(part.a.shape[0] if isinstance(part, Products) else 1 for part in parts)
  tokens = tokens_of(parts)
  return batches * tokens * _row_bytes(tokens)
