"""One example moves a clipped sum by no more than C, whatever it holds."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpcap import privacy
from tests.privacy.clipping import zoo
from tests.privacy.clipping.programs import (
  BATCH,
  CLIP_NORM,
  FLOAT32,
  INF,
  MARGIN,
  NAN,
  alone,
  assert_close,
  both_strategies,
  cast,
  check_unusable_is_masked,
  difference,
  half_clipped,
  norm,
  program,
)

# --- Sensitivity.

SENSITIVE = {name: zoo.ZOO[name] for name in FLOAT32} | zoo.BFLOAT16


@both_strategies
@pytest.mark.parametrize('name', SENSITIVE)
def test_an_example_contributes_at_most_clip_norm(rng, name, strategy):
  build = SENSITIVE[name]
  call, batch = program(build, strategy, np.float32).call, build().make_batch(rng, BATCH)
  dtype = np.float32 if name in zoo.BFLOAT16 else np.float64
  half = half_clipped(build, dtype, batch, np.ones(BATCH, bool))
  whole, ones = call(batch, scale=half), alone(call, batch, half)
  for i, one in enumerate(ones):
    assert norm(one.sum) <= CLIP_NORM * MARGIN
    without = call(batch, np.arange(BATCH) != i, half)
    # Free of C: the rounding of sums in float32.
    assert norm(difference(whole.sum, without.sum)) <= CLIP_NORM * MARGIN + 1e-6 * BATCH
  for scale in half * 10.0 ** rng.uniform(0, 6, 3):
    for one in alone(call, batch, scale):
      assert norm(one.sum) <= CLIP_NORM * MARGIN


class Linear(NamedTuple):
  """A layer that is linear in x; shapes of its parameter, its input and its output."""

  apply: Callable
  w: tuple[int, ...]
  x: tuple[int, ...]
  y: tuple[int, ...]


def _conv(x, w):
  return lax.conv_general_dilated(
    x[None], w, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )[0]


def _over_time(x, w):
  return lax.scan(lambda _, x: (None, x @ w), None, x)[1]


def _look_up(x, w):
  return w[jnp.arange(6) % 3] * x  # what multiplies it is its output's gradient


# Norms from Gram matrices or from products, of parameters used once, often, and at two sites.
LINEAR = {
  'few_tokens': Linear(jnp.dot, (8, 9), (2, 8), (2, 9)),
  'many_tokens': Linear(jnp.dot, (3, 4), (16, 3), (16, 4)),
  'one_token': Linear(jnp.dot, (7, 8), (7,), (8,)),
  'few_patches': Linear(_conv, (2, 2, 3, 16), (2, 3, 3), (1, 2, 16)),
  'many_patches': Linear(_conv, (2, 2, 1, 2), (4, 5, 1), (3, 4, 2)),
  'lookup': Linear(_look_up, (3, 5), (6, 5), (6, 5)),
  'scan': Linear(_over_time, (8, 8), (2, 8), (2, 8)),
  'long_scan': Linear(_over_time, (3, 3), (12, 3), (12, 3)),
  'two_sites': Linear(lambda x, w: jnp.concatenate([x[:1] @ w, x[1:] @ w]), (9, 8), (2, 9), (2, 8)),
  'bias': Linear(lambda x, w: x + w, (4,), (6, 4), (6, 4)),
}


def _linear_model(dtype) -> zoo.Model:
  """All linear layers beside each other; inputs and output gradients are the example.

  A test sets those of one layer and leaves zeros for the others.
  """

  def loss_fn(params, example):
    terms = [
      jnp.sum(g.astype(jnp.float32) * layer.apply(x.astype(dtype), params[name].astype(dtype)))
      for name, layer in LINEAR.items()
      for x, g in [example[name]]
    ]
    return sum(terms)

  def make_batch(rng, size):
    del rng
    return {
      name: (np.zeros((size, *layer.x)), np.zeros((size, *layer.y)))
      for name, layer in LINEAR.items()
    }

  params = {name: np.zeros(layer.w) for name, layer in LINEAR.items()}
  return zoo.Model(loss_fn, params, make_batch)


linear_float32 = functools.cache(functools.partial(_linear_model, jnp.float32))
linear_bfloat16 = functools.cache(functools.partial(_linear_model, jnp.bfloat16))


def _constant(mantissa):
  """All entries the same: all products round the same way."""

  def make(rng, x, g):
    k = 2.0 ** rng.integers(-6, 7, (BATCH, 2))
    fill = lambda y, k: mantissa * k.reshape(-1, *[1] * (y.ndim - 1)) + 0 * y
    return fill(x, k[:, 0]), fill(g, k[:, 1])

  return make


def _cancelling(rest):
  """Tokens in pairs whose terms cancel up to `rest`."""

  def make(rng, x, g):
    pair = lambda y, sign: np.where(
      np.arange(y.shape[1]).reshape(-1, *[1] * (y.ndim - 2)) % 2, sign * y[:, :1], y[:, :1]
    )
    x, g = rng.normal(size=x.shape), rng.normal(size=g.shape)
    if x.ndim == 2:
      return x, g
    return pair(x, 1), pair(g, -(1 + rest))

  return make


def _of_all_sizes(rng, x, g):
  sizes = lambda y: rng.normal(size=y.shape) * np.exp(3 * rng.normal(size=y.shape))
  return sizes(x), sizes(g)


ADVERSARIAL = {
  'equal mantissas of float32': _constant(1.00390625),
  'equal mantissas just above a bfloat16': _constant(1 + 2**-7),
  'equal mantissas just below a bfloat16': _constant(2 - 2**-7),
  'equal mantissas that bfloat16 rounds up': _constant(1 + 2**-8 + 2**-12),
  'equal mantissas that bfloat16 rounds down': _constant(1 + 2**-8 - 2**-12),
  'all sizes': _of_all_sizes,
  'cancels to nothing': _cancelling(0),
  'cancels to 1e-2': _cancelling(2**-6),
  'cancels to 1e-3': _cancelling(1e-3),
  'cancels to 1e-5': _cancelling(1e-5),
}


@both_strategies
@pytest.mark.parametrize('kind', ADVERSARIAL)
@pytest.mark.parametrize('build', [linear_float32, linear_bfloat16], ids=['float32', 'bfloat16'])
def test_an_adversary_contributes_at_most_clip_norm(rng, build, kind, strategy):
  call = program(build, strategy, np.float32, in_haste=False).call
  exceeded = {}
  for layer in LINEAR:
    batch = build().make_batch(rng, BATCH)
    batch[layer] = ADVERSARIAL[kind](rng, *batch[layer])
    batch[layer] = tuple(np.float32(y) for y in batch[layer])
    for scale in (1.0, 1e3, 1e7):
      largest = max(norm(one.sum) for one in alone(call, batch, scale))
      if not largest <= CLIP_NORM * MARGIN:
        exceeded[layer, scale] = largest / CLIP_NORM - 1
      # Bounds on rounding are tight enough to leave most of a gradient.
      if 'cancels' not in kind and scale == 1e7:
        assert largest >= CLIP_NORM * (1 - 0.05), layer
  assert not exceeded


@both_strategies
@pytest.mark.parametrize('size', [1e-14, 1e14])
def test_activations_and_gradients_of_very_different_sizes_are_no_overflow(rng, strategy, size):
  expect, call = (
    program(linear_float32, s, np.float32, in_haste=False).call for s in ('vmap', strategy)
  )
  for layer in set(LINEAR) - {'bias', 'lookup'}:
    batch = linear_float32().make_batch(rng, BATCH)
    x, g = batch[layer]
    batch[layer] = rng.normal(size=x.shape) * size, rng.normal(size=g.shape) / size
    assert_close(call(batch), expect(batch), 1e-5)


@both_strategies
def test_a_row_that_does_not_exist_cancels_nothing(strategy):
  # What is read past the end has no gradient, however it is filled: clipped to the last row
  # it would cancel that row's in the norm, but not in the sum.
  batch = {'ids': jnp.array([[4, 7]]), 'gradients': jnp.array([[[100.0], [-100.0]]])}
  result = privacy.clipped_sum(
    lambda p, e: jnp.sum(p[e['ids']] * e['gradients']),
    jnp.ones((5, 1)),
    batch,
    clip_norm=CLIP_NORM,
    strategy=strategy,
  )
  assert norm(result.sum) <= CLIP_NORM * MARGIN


@both_strategies
@pytest.mark.parametrize('value', [NAN, INF, 1e15, 1e30])
@pytest.mark.parametrize('name', sorted(set(FLOAT32) - {'tied_embedding'}))
def test_an_unusable_example_is_as_if_masked_in_float32(rng, name, strategy, value):
  call = program(zoo.ZOO[name], strategy, np.float32).call
  batch = zoo.ZOO[name]().make_batch(rng, BATCH)
  bad = rng.permutation(BATCH) < 2
  check_unusable_is_masked(call, cast(batch, np.float32), bad, value)
