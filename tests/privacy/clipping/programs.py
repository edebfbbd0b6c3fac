"""Models of the zoo under each strategy, compiled once, and how results are compared."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy import clipping
from tests.privacy.clipping import zoo
from tests.privacy.clipping.compiler_options import AT_LEISURE, haste

BATCH, CLIP_NORM = 5, 1.0
STRATEGIES = [name for name in privacy.CLIPPING_STRATEGIES if name != 'vmap']
MARGIN = 1 + clipping.ROUNDING_MARGIN
NAN, INF = float('nan'), float('inf')

# Compiled in float32 too: every way in which norms are computed.
FLOAT32 = (
  'mlp',
  'dense_on_tokens',
  'self_attention',
  'conv_2d',
  'conv_on_large_images',
  'embedding',
  'tied_embedding',
  'norms',
  'scan_over_layers',
  'scan_over_time',
  'augmentation_multiplicity',
)

both_strategies = pytest.mark.parametrize('strategy', STRATEGIES)


class Program(NamedTuple):
  """A model's clipped_sum, compiled for batches of BATCH examples.

  Attributes:
    call: of (batch, mask, scale); the loss is multiplied by scale. Returns numpy arrays.
    warnings: all that came up while it was traced.
  """

  call: Callable[..., clipping.ClippedSum]
  warnings: list[warnings.WarningMessage]


@functools.cache
def program(build, strategy, dtype, in_haste=True) -> Program:
  """One compilation per model (`zoo.entry`), strategy and type of floats."""
  with jax.enable_x64(dtype == np.float64):
    model = build()
    params = cast(model.params, dtype)

    def clipped_sum(params, batch, mask, scale):
      loss_fn = lambda params, example: scale * model.loss_fn(params, example)
      return privacy.clipped_sum(
        loss_fn, params, batch, mask, clip_norm=CLIP_NORM, strategy=strategy
      )

    inputs = cast(model.make_batch(np.random.default_rng(0), BATCH), dtype)
    mask = np.ones(BATCH, bool)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      jitted = jax.jit(clipped_sum, compiler_options=haste() if in_haste else AT_LEISURE)
      traced = jitted.trace(params, inputs, mask, dtype(1))
    compiled = traced.lower().compile()

  def call(batch, mask=mask, scale=1.0):
    with jax.enable_x64(dtype == np.float64):
      return jax.tree.map(
        np.asarray, compiled(params, cast(batch, dtype), np.asarray(mask), dtype(scale))
      )

  return Program(call, caught)


def is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def norm(tree):
  """L2 norm over all leaves, in float64."""
  return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def difference(a, b):
  return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)


def assert_identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(actual, expected, tolerance):
  """`tolerance`: relative, of each norm, factor and loss, and of the whole sum."""
  for name in ('norms', 'factors', 'losses'):
    np.testing.assert_allclose(
      getattr(actual, name), getattr(expected, name), rtol=tolerance, err_msg=name
    )
  jax.tree.map(lambda a, e: np.testing.assert_equal(a.shape, e.shape), actual.sum, expected.sum)
  errors = jax.tree.map(lambda d: float(norm(d)), difference(actual.sum, expected.sum))
  assert norm(errors) <= tolerance * norm(expected.sum), errors


def random_mask(rng):
  """Two examples or more count."""
  return rng.permutation(BATCH) < rng.integers(2, BATCH + 1)


def half_clipped(build, dtype, batch, mask):
  """The scale of the loss at which half of the examples that count are clipped."""
  norms = program(build, 'vmap', dtype).call(batch, mask).norms[mask]
  return CLIP_NORM / np.median(norms[np.isfinite(norms) & (norms > 0)])


def alone(call, batch, scale):
  """What each example contributes by itself."""
  return [call(batch, np.arange(BATCH) == i, scale) for i in range(BATCH)]


def spoil(batch, rows, value):
  """Every float of these rows becomes `value` times itself."""
  shaped = lambda x: rows.reshape(-1, *[1] * (x.ndim - 1))
  change = lambda x: np.where(shaped(x), value * x, x) if is_float(x) else x
  with np.errstate(invalid='ignore'):
    return jax.tree.map(change, batch)


def has_floats(name):
  model = zoo.ZOO[name]()
  return any(is_float(x) for x in jax.tree.leaves(model.make_batch(np.random.default_rng(0), 1)))


def check_unusable_is_masked(call, batch, bad, value):
  """A spoilt example is what a masked one is, to the bit."""
  masked = call(batch, ~bad)
  spoilt = call(spoil(batch, bad, value))
  np.testing.assert_array_equal(spoilt.norms[~bad], masked.norms[~bad])
  np.testing.assert_array_equal(spoilt.factors[~bad], masked.factors[~bad])
  np.testing.assert_array_equal(spoilt.losses[~bad], masked.losses[~bad])
  if not np.isfinite(spoilt.norms[bad]).all():
    assert_identical(spoilt.sum, masked.sum)
    assert not spoilt.factors[bad].any()
  by_itself = call(spoil(batch, bad, value), bad)
  assert norm(by_itself.sum) <= bad.sum() * CLIP_NORM * MARGIN
  if not np.isfinite(by_itself.norms[bad]).all():
    assert norm(by_itself.sum) == 0
  assert_identical(call(spoil(batch, bad, value), ~bad), masked)
  return spoilt.norms[bad]
