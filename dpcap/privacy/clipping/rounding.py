"""The arithmetic that norms and sums are proven for, and sums whose order is known.

Model. Let u be the unit roundoff of a type (half its eps: 2^-24 for float32).

1. An addition, multiplication, division or square root gives its exact result times 1 + d,
   |d| <= u; fused or not. A result below the smallest normal number TINY may become 0.
2. A product of arrays in float32 or wider, at the highest precision, sums n terms x_i y_i in ANY
   order, with exact or rounded products. What comes out is off by at most

       gamma(n) sum_i |x_i y_i|,     gamma(n) = n u / (1 - n u)

   (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1: every term meets
   at most n roundings). TF32 breaks it; precision `highest` forbids it. TPUs make a float32
   product of six bfloat16 ones, which is taken to be within the model, not known.
   Convolutions by FFT or by Winograd's method, which a GPU's library may choose, are outside it.
3. bfloat16 and float16 operands have exact products in float32. Tensor cores add these up
   with fewer guard bits than IEEE asks for: their u counts NARROW times.

Lemma. A sum of n numbers x_i, added in any order, is off by at most

    gamma(n) (sum |x_i| + |sum x_i|) / 2:

each of n - 1 additions rounds a partial sum, and a partial sum is at most the sum of all that is
positive or of all that is negative, whichever is more, which is that half. It counts all additions.
In a tree those that one number meets are fewer, but the partial sums of a level may add up to
sum |x_i|, twice that half: where n counts what a number meets, the error is gamma(n) sum |x_i|.

A bound with n terms is worst where n is large, and a sum whose order is known needs no n:
`tree_sum` adds eight terms at a time, so that a term meets 7 log8(n) roundings.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# How many unit roundoffs of float32 an addition of narrow products takes at most.
NARROW = 4

# Smaller float32 numbers may be zero.
TINY = float(jnp.finfo(jnp.float32).tiny)

# What computing a bound may lose of it.
SLACK = 1 + 1e-3

# Types of parameters, and of products whose norms are known to be right.
FLOATS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))

# Terms that one level of a tree_sum takes together.
_WAYS = 8


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` in float32, or in its own type if that has more bits."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit_roundoff(dtype: Any) -> float:
  """u of a type: the largest relative error of one rounding to it."""
  return float(jnp.finfo(dtype).eps) / 2


def gamma(terms: int, dtype: Any) -> float:
  """Bounds the relative error of a sum of so many terms, in any order, whose type is `dtype`.

  In narrow types: of their products, summed in float32. Infinity where nothing is known.
  """
  u = unit_roundoff(jnp.promote_types(dtype, jnp.float32))
  if jnp.dtype(dtype).itemsize < 4:
    u *= NARROW
  return terms * u / (1 - terms * u) if terms * u < 0.5 else math.inf


def dot(a: jax.Array, b: jax.Array, numbers) -> jax.Array:
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


def tree_sum(x: jax.Array) -> jax.Array:
  """The sum of all entries, in a tree: `tree_depth(x.size)` roundings for each.

  So it is off by at most gamma(tree_depth(x.size)) times the sum of absolute values. NaN or
  infinity where a partial sum is.
  """
  x = x.ravel()
  while x.size > 1:
    ways = min(_WAYS, x.size)
    x = jnp.sum(jnp.pad(x, (0, -x.size % ways)).reshape(ways, -1), axis=0)
    # XLA makes one sum of two that follow each other, in whatever order it likes. What is past
    # the largest float, to either side, is infinity from here on.
    x = jnp.where(jnp.isinf(x), jnp.inf, x)
  return x.reshape(()) if x.size else jnp.zeros((), x.dtype)


def rough_sum(x: jax.Array) -> jax.Array:
  """The sum of a matrix of numbers that are not negative, good enough for a bound.

  Rows are added in any order and their sums in a tree: off by gamma(rows + tree_depth(columns)).
  """
  return tree_sum(jnp.sum(x, axis=0))


def tree_depth(size: int) -> int:
  """How many additions a term of a `tree_sum` over so many takes part in, at most."""
  depth = 0
  while size > 1:
    ways = min(_WAYS, size)
    depth, size = depth + ways - 1, -(-size // ways)
  return depth


def sum_in_pairs(terms: list[jax.Array]) -> jax.Array:
  """The sum of arrays of one shape by a balanced tree: ceil(log2(n)) roundings for each."""
  while len(terms) > 1:
    odd = terms[len(terms) // 2 * 2 :]
    terms = [a + b for a, b in zip(terms[::2], terms[1::2])] + odd
  return terms[0]


def sum_of_squares(x_B: jax.Array) -> jax.Array:
  """(B, ...) -> (B,): squares of all but the first axis, in at least float32, by `tree_sum`."""
  return jax.vmap(lambda x: tree_sum(jnp.square(at_least_float32(x))))(x_B)
