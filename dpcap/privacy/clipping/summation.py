"""Running sums that do not lose small terms (Knuth's TwoSum, as in Ogita, Rump and Oishi 2005).

A logical batch of 1.3 million examples in physical batches of 16 is 80,000 terms. Added one
by one in float32, each addition rounds relative to the sum so far, which is thousands of
times the term. This sum keeps exactly what each addition lost, and adds up these rests.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class RunningSum(NamedTuple):
  """A sum so far: `total + rest`, two trees like its terms.

  Claim: of n terms whose exact sum is s, `value()` is off by at most

      u |s| + gamma(n)^2 sum |terms|,

  u the unit roundoff and gamma(n) = n u / (1 - n u) (Ogita, Rump and Oishi, Accurate Sum and Dot
  Product, SIAM J. Sci. Comput. 26(6), 2005, proposition 4.5): one rounding of the result, unless
  terms cancel to less than 1e-8 of their size. For n < 1e6, and where no partial sum is past the
  largest float.

  Attributes:
    total: the rounded sum.
    rest: the sum of all that rounding took from it.
  """

  total: PyTree
  rest: PyTree

  def add(self, term: PyTree) -> 'RunningSum':
    """The sum with `term`, a tree like it, added."""
    total = jax.tree.map(jnp.add, self.total, term)
    return RunningSum(total, jax.tree.map(_rest, self.rest, self.total, term, total))

  def value(self) -> PyTree:
    """The sum."""
    return jax.tree.map(jnp.add, self.total, self.rest)


def _rest(rest: jax.Array, a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
  """`rest`, and what `total`, the rounded a + b, lost: exact, whichever of the two is larger."""
  from_b = total - a
  from_a = total - from_b
  return rest + ((a - from_a) + (b - from_b))


def running_sum(like: PyTree) -> RunningSum:
  """The empty sum of terms shaped as `like`, in float32 or the better type of `like`."""
  zeros = lambda: jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like
  )
  return RunningSum(zeros(), zeros())
