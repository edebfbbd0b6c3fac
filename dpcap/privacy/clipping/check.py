"""Compares a clipping strategy with vmap on a loss, before it is trusted with a run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.privacy.clipping.clip_functions import Clip, ClipFunction
from dpcap.privacy.clipping.clipped_sum import clipped_sum
from dpcap.privacy.clipping.strategy import LossFn

PyTree = Any

# Strategies round differently, by no more than these fractions; a missing term is far more.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-2, 0.1

# What is compared runs twice: on CPU, making it fast takes longer than all else here.
_IN_HASTE = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


class ClippingMismatch(ValueError):
  """A strategy gave another answer than vmap."""


def check_clipping(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  *,
  clip_function: ClipFunction = Clip(),
  strategy: str = 'auto',
  low_precision: bool = False,
) -> float:
  """Refuses a strategy whose norms or clipped sums on `batch` are not those of vmap.

  And a loss that takes something from the other examples of a batch.

  A few synthetic examples of the real shapes will do. Costs one compilation and one step of
  vmap on them. What is compared is how gradients are put together; what the run itself compiles is
  made faster by the same compiler.

  Args:
    loss_fn, params, batch, clip_function, strategy: as for `clipped_sum`.
    low_precision: whether the loss computes in less than float32.

  Returns:
    The largest relative difference: of an example's norm, or of the sum of all.

  Raises:
    ClippingMismatch: with the difference and the parameter that shows the most of it.
  """

  in_haste = _IN_HASTE if jax.default_backend() == 'cpu' else None

  @functools.partial(jax.jit, compiler_options=in_haste)
  def both(params, batch):
    run = lambda strategy: clipped_sum(
      loss_fn, params, batch, clip_norm=1.0, clip_function=clip_function, strategy=strategy
    )
    return run(strategy), run('vmap')

  actual, expected = jax.device_get(both(params, batch))
  if not np.all(np.isfinite(expected.norms)):
    raise ClippingMismatch(f'vmap gives norms {expected.norms} on synthetic examples')
  flat = lambda tree: jax.tree_util.tree_leaves_with_path(tree)
  errors = {
    jax.tree_util.keystr(path, simple=True, separator='/'): float(np.linalg.norm(a - b))
    for (path, a), (_, b) in zip(flat(actual.sum), flat(expected.sum), strict=True)
  }
  total = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected.sum)))
  tiny = np.finfo(np.float32).tiny
  norms = np.max(np.abs(actual.norms - expected.norms) / np.maximum(expected.norms, tiny))
  # Not Python's max, which can lose a NaN.
  difference = float(np.maximum(norms, np.linalg.norm(list(errors.values())) / max(total, tiny)))
  allowed = _LOW_PRECISION_TOLERANCE if low_precision else _TOLERANCE
  if not difference <= allowed:
    worst = max(errors, key=errors.get)
    raise ClippingMismatch(
      f'clipping {strategy!r} differs from vmap by {difference:.2g} (allowed: {allowed:g}), most in'
      f' {worst}; this model needs clipping vmap'
    )
  # The first and the last example, each among copies of itself in place of the others.
  for i in (0, -1):
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x[i], jnp.shape(x)), batch)
    by_itself, _ = jax.device_get(both(params, copies))
    for name in ('losses', 'norms'):
      here, there = getattr(actual, name)[i], getattr(by_itself, name)[i]
      if not abs(here - there) <= allowed * abs(here):
        raise ClippingMismatch(
          f'{name} of an example change with its company, {here:g} among others and {there:g} among'
          ' copies of itself: the loss mixes examples, which no clipping makes private'
        )
  return difference
