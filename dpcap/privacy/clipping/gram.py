"""Gram matrices of tokens, with a bound on what each entry is off by.

An entry is A_ts = a_t . a_s, of vectors of K numbers. Write D_ts for a bound on sum_k |a_tk a_sk|:
|a_t| |a_s| by Cauchy and Schwarz or, sharper where entries are uneven, the sum over slices of the
axis of the products of the slices' lengths. A Gram matrix is computed slice by slice,
A_ts = sum_i A^i_ts, in products of few terms. By the lemma of `rounding.py` slices of n terms are
together off by gamma(n) (D_ts + sum_i |A^i_ts|) / 2, and slices are added in a known order, in
which each meets m additions. So, products and what falls below TINY counted too, the entry is off
by at most

  E_ts = gamma(n) (D_ts + sum_i |A^i_ts|) / 2 + gamma(m) sum_i |A^i_ts| + gamma(1) D_ts + 2 K TINY.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.rounding import SLACK, TINY, at_least_float32, dot, gamma, sum_in_pairs

# Terms of an entry that are added in an unknown order. Fewer are a tighter bound and more work.
_SLICE = 96

# Slices that a program holds at once; further ones are a loop.
_SLICES_AT_ONCE = 8

# Products of rows with rows.
_OF_ROWS = (((1,), (1,)), ((), ()))


class Gram(NamedTuple):
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


def gram_matrix(x: jax.Array | None, y: jax.Array) -> Gram:
  """All products of x (R, n) with y (T, n); x None: y itself."""
  return _at_once(x, y) if y.shape[1] <= _SLICE * _SLICES_AT_ONCE else _in_a_loop(x, y)


def _at_once(x: jax.Array | None, y: jax.Array) -> Gram:
  n = y.shape[1]
  slices = _products(y if x is None else x, y)
  value, parts = sum_in_pairs(slices), _absolute(slices)
  if x is None:
    lengths = (_own_lengths(value, n, y.dtype),) * 2
  else:
    lengths = vector_lengths(x), vector_lengths(y)
  size = lengths[0][:, None] * lengths[1]
  error = _error(parts, size, n, -(-n // len(slices)), len(slices).bit_length(), y.dtype)
  return Gram(value, error, size, lengths, parts)


def _in_a_loop(x: jax.Array | None, y: jax.Array) -> Gram:
  n, stride = y.shape[1], _SLICE * _SLICES_AT_ONCE
  rounds = n // stride

  def add(i, sums):
    value, size, parts = sums
    cut = lambda z: jax.lax.dynamic_slice_in_dim(z, i * stride, stride, 1)
    slices = _products(cut(y if x is None else x), cut(y))
    if x is None:
      lengths = (jnp.stack([_own_lengths(part, _SLICE, y.dtype) for part in slices]),) * 2
    else:
      by_slice = lambda z: vector_lengths(cut(z).reshape(len(z), _SLICES_AT_ONCE, _SLICE)).T
      lengths = by_slice(x), by_slice(y)
    sizes = dot(*lengths, (((0,), (0,)), ((), ())))
    return value + sum_in_pairs(slices), size + sizes, parts + _absolute(slices)

  # What is left over is less than one round of the loop.
  rest = lambda z: z[:, rounds * stride :]
  first = _at_once(None if x is None else rest(x), rest(y))
  start = first.value, first.size, first.parts
  value, size, parts = jax.lax.fori_loop(0, rounds, add, start)
  size *= SLACK
  added = _SLICES_AT_ONCE.bit_length() + rounds
  return Gram(value, _error(parts, size, n, _SLICE, added, y.dtype), size)


def _products(x: jax.Array, y: jax.Array) -> list[jax.Array]:
  """All products of x with y, slice by slice."""
  n = y.shape[1]
  slices = max(1, -(-n // _SLICE))
  width = max(1, -(-n // slices))
  cut = lambda z, i: z[:, i : i + width]
  return [dot(cut(x, i), cut(y, i), _OF_ROWS) for i in range(0, max(1, n), width)]


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


def vector_lengths(y: jax.Array) -> jax.Array:
  """At least the lengths of vectors along the last axis."""
  n = y.shape[-1]
  squares = jnp.sum(jnp.square(at_least_float32(y)), axis=-1)
  return _length(squares, n, gamma(n + 1, squares.dtype))


def _length(squares: jax.Array, n: int, error: float) -> jax.Array:
  """At least the length of a vector of `n` numbers whose squares add up to this, up to `error`."""
  return jnp.sqrt(squares * (1 + 2 * error) + n * TINY)


def _own_lengths(value: jax.Array, n: int, dtype) -> jax.Array:
  """The same, of vectors of n numbers whose Gram matrix this is."""
  # jnp.diagonal would be a gather, which compiles and runs far slower.
  return _length(value.ravel()[:: len(value) + 1], n, gamma(n + 1, dtype))
