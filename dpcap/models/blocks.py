"""Blocks of one kind, one after the other: unrolled or as a scan, with or without remat."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# Where the parameters of scanned blocks are, stacked along a leading axis of blocks; unrolled
# ones are in block_0, block_1, ...
_STACKED = 'blocks'


def run_blocks(
  block: type[nn.Module],
  depth: int,
  x: jax.Array,
  *shared: jax.Array,
  scan: bool = False,
  remat: bool = False,
  observe: Callable[[jax.Array], jax.Array] | None = None,
  **settings,
) -> jax.Array:
  """x = block(x, *shared), `depth` times with parameters of its own; call it in a compact method.

  Args:
    block: module class whose call takes x and returns the next x.
    depth: how many.
    x: what goes from block to block.
    shared: further arguments, the same for all.
    scan: one compiled block that runs `depth` times, its parameters stacked. Compiling takes the
      time of one block; XLA cannot overlap or fuse across blocks.
    remat: the backward pass computes what is inside of a block again: memory for one block's
      activations, for a third more time.
    observe: a function of the x after each block.
    settings: the module's attributes.

  Returns:
    The last x; with `observe` its values instead, with an axis of blocks in front.
  """
  if remat:
    # A scan keeps the two computations apart by itself.
    block = nn.remat(block, prevent_cse=not scan)

  def step(block, x, *shared):
    x = block(x, *shared)
    return x, observe(x) if observe else None

  if scan:
    run = nn.scan(
      step,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=depth,
    )
    x, seen = run(block(**settings, name=_STACKED), x, *shared)
    return seen if observe else x
  seen = []
  for i in range(depth):
    x, value = step(block(**settings, name=f'block_{i}'), x, *shared)
    seen.append(value)
  return jnp.stack(seen) if observe else x


def unstack_blocks(variables: dict) -> dict:
  """The variables of the model whose blocks are unrolled, from those of scanned blocks.

  What has no scanned blocks is returned as it is.
  """
  if not isinstance(variables, dict):
    return variables
  out = {name: unstack_blocks(value) for name, value in variables.items() if name != _STACKED}
  if stacked := variables.get(_STACKED):
    depth = len(jax.tree.leaves(stacked)[0])
    out |= {f'block_{i}': jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)}
  return out


def stack_blocks(variables: dict, like: dict) -> dict:
  """The inverse of `unstack_blocks`, where `like` (arrays or shapes) has scanned blocks.

  Args:
    variables: numpy arrays, all that `like` has but for its blocks being unrolled.
    like: variables of the model that they are for.
  """
  if not isinstance(like, dict):
    return variables
  out = {name: stack_blocks(variables[name], like[name]) for name in like if name != _STACKED}
  if stacked := like.get(_STACKED):
    depth = jax.tree.leaves(stacked)[0].shape[0]
    blocks = [variables[f'block_{i}'] for i in range(depth)]
    out[_STACKED] = jax.tree.map(lambda *arrays: np.stack(arrays), *blocks)
  return out
