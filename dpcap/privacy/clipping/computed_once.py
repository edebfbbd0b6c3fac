"""Values that are computed once.

Norm and sum must be of the same numbers, and a compiler does not see it so: it computes a value
again for each of its uses where that saves memory traffic, and rounds it otherwise there (with a
fused multiply-add in one place, without in another). Where a gradient is a small rest of large
terms, the norm may then be 0 and the sum anything. `lax.optimization_barrier` does not help: XLA
removes it on CPU before it decides what to compute again (`cse_barrier_expander`, jax 0.10).
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def settled(tree: PyTree, witness: PyTree) -> PyTree:
  """The same arrays, as numbers in memory that all further uses read.

  They go through a loop that never runs. That it does not is known at run time only, and it would
  change them, so no compiler can look through it.

  Args:
    tree: of arrays of any type.
    witness: of arrays, at least one of which is not known when the program is compiled, whatever
      the loss, the parameters and the batch are: the state of a loop, or `tree` itself.
  """
  witness = jax.tree.leaves(witness)
  count = sum(jnp.sum(w != 0, dtype=jnp.float32) for w in witness)
  # Not more than there are; twice, as large counts are rounded.
  never = count > 1.0 + 2.0 * sum(w.size for w in witness)
  changed = lambda x: -x if jnp.issubdtype(x.dtype, jnp.inexact) else ~x

  def body(state):
    runs, tree = state
    return ~runs, jax.tree.map(changed, tree)

  return jax.lax.while_loop(lambda state: state[0], body, (never, tree))[1]
