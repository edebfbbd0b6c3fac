"""Sums of a whole logical batch, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy import clipping

PHYSICAL, CLIP_NORM = 16, 1.0


def loss_fn(params, example):
  """Squared error of a matrix of weights: its gradient is an outer product."""
  return jnp.sum(jnp.square(example['x'] @ params['w'] + params['b'] - example['y'])) / 2


@functools.cache
def accumulate(count, strategy='auto'):
  """(params, examples (count, PHYSICAL, ...), mask) -> compensated sum, and the naive one."""

  @jax.jit
  def run(params, examples, mask):
    def add(i, sums):
      batch, used = jax.tree.map(lambda x: x[i], (examples, mask))
      term = privacy.clipped_sum(
        loss_fn, params, batch, used, clip_norm=CLIP_NORM, strategy=strategy
      ).sum
      return sums[0].add(term), jax.tree.map(jnp.add, sums[1], term)

    zero = jax.tree.map(jnp.zeros_like, params)
    total, naive = jax.lax.fori_loop(0, count, add, (privacy.running_sum(params), zero))
    return total.value(), naive

  return run


def float64_sum(params, x, y):
  """The clipped sum of all examples, in float64."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  error = x @ np.float64(params['w']) + np.float64(params['b']) - y
  norms = np.linalg.norm(error, axis=-1) * np.sqrt(1 + np.sum(x**2, -1))
  error *= np.minimum(1, CLIP_NORM / norms)[..., None]
  return {'w': np.einsum('bti,bto->io', x, error), 'b': error.reshape(-1, 2).sum(0)}


def distance(a, b):
  squares = jax.tree.map(lambda x, y: np.sum((np.asarray(x, np.float64) - y) ** 2), a, b)
  return np.sqrt(sum(jax.tree.leaves(squares)))


# The bounds on rounding that bookkeeping adds to norms make all factors a little smaller.
@pytest.mark.parametrize('strategy, tolerance', [('vmap', 1e-7), ('bookkeeping', 1e-6)])
def test_a_batch_of_a_million_in_steps_of_16_loses_nothing(rng, strategy, tolerance):
  # The recipe's logical batch: 1,310,720 examples, 81,920 terms.
  count = 1_310_720 // PHYSICAL
  params = {'w': np.float32(rng.normal(size=(3, 2))), 'b': np.float32(rng.normal(size=2))}
  x = rng.normal(size=(count, PHYSICAL, 3)).astype(np.float32) + 1
  y = rng.normal(size=(count, PHYSICAL, 2)).astype(np.float32)
  mask = np.ones((count, PHYSICAL), bool)
  total, naive = accumulate(count, strategy)(params, {'x': x, 'y': y}, mask)
  expected = float64_sum(params, x, y)
  size = distance(expected, jax.tree.map(np.zeros_like, expected))
  assert size > 1e5  # in units of C: where float32 resolves no better than 0.008
  assert distance(total, expected) <= tolerance * size
  if strategy == 'vmap':
    # The bar is not met by itself.
    assert distance(naive, expected) > distance(total, expected)


@pytest.mark.parametrize('count', [512, 4096])
def test_leaving_one_out_of_many_equal_examples_moves_the_sum_by_clip_norm(rng, count):
  params = {'w': np.zeros((3, 2), np.float32), 'b': np.zeros(2, np.float32)}
  example = {'x': rng.normal(size=3), 'y': 5 * rng.normal(size=2)}
  examples = jax.tree.map(
    lambda v: np.broadcast_to(np.float32(v), (count, PHYSICAL, *v.shape)), example
  )
  mask = np.ones((count, PHYSICAL), bool)
  one_less = mask.copy()
  one_less[rng.integers(count), rng.integers(PHYSICAL)] = False
  run = accumulate(count)
  moved = distance(run(params, examples, mask)[0], run(params, examples, one_less)[0])
  # Two sums of this size are each rounded once.
  rounded = count * PHYSICAL * CLIP_NORM * np.finfo(np.float32).eps
  assert moved <= CLIP_NORM * (1 + clipping.ROUNDING_MARGIN) + rounded


def test_the_sum_of_nothing_is_zero():
  empty = privacy.running_sum({'a': jnp.ones((2, 3), jnp.bfloat16)})
  assert empty.total['a'].dtype == jnp.float32
  np.testing.assert_array_equal(empty.value()['a'], np.zeros((2, 3)))
