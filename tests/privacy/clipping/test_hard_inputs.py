"""Clipping where floats are too short, parameters are odd, and temporaries are cut up."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dpcap import privacy
from dpcap.privacy.clipping import outer_products
from tests.privacy.clipping import zoo
from tests.privacy.clipping.compiler_options import AT_LEISURE, haste
from tests.privacy.clipping.programs import (
  BATCH,
  CLIP_NORM,
  MARGIN,
  assert_close,
  both_strategies,
  difference,
  half_clipped,
  norm,
  program,
  random_mask,
)


@functools.cache
def compiled(loss_fn, strategy, in_haste=True, clip_norm=CLIP_NORM):
  """clipped_sum, compiled once for each shape."""
  function = lambda *args: privacy.clipped_sum(
    loss_fn, *args, clip_norm=clip_norm, strategy=strategy
  )
  return jax.jit(function, compiler_options=haste() if in_haste else AT_LEISURE)


def clip(loss_fn, params, batch, strategy):
  return compiled(loss_fn, strategy)(params, batch)


# --- Sizes at the ends of what a float holds.


def product(p, example):
  return jnp.sum((example['x'] @ p) * example['g'])


def products(rng, tokens, size_x, size_g):
  """Inputs of `product` with a parameter (8, 9), by Gram matrices up to 4 tokens."""
  x, g = rng.normal(size=(1, tokens, 8)) * size_x, rng.normal(size=(1, tokens, 9)) * size_g
  return {'x': np.float32(x), 'g': np.float32(g)}


@both_strategies
@pytest.mark.parametrize('tokens', [1, 3, 40])
@pytest.mark.parametrize('size', [-30, -25, -22, -19, -17, 8, 12, 16, 17, 18])
def test_squares_past_the_ends_of_float32_release_no_more_than_clip_norm(
  rng, tokens, size, strategy
):
  for other in (-18, -10, 0, 10, 15, 17):
    for batch in (
      products(rng, tokens, 10.0**size, 10.0**other),
      products(rng, tokens, 10.0**other, 10.0**size),
    ):
      result = clip(product, jnp.zeros((8, 9)), batch, strategy)
      assert norm(result.sum) <= CLIP_NORM * MARGIN  # and is a number
      assert np.isfinite(result.norms) or norm(result.sum) == 0
      assert np.isfinite(result.factors)


def tied(p, example):
  """A lookup and a product of one parameter; what they are multiplied by is their gradient."""
  found = jnp.sum(p[example['ids']] * example['h'])
  return found + jnp.sum((example['x'] @ p.T) * example['g'])


@both_strategies
@pytest.mark.parametrize('h', [1e-12, 3e-12, 1e-11, 1e-10])
def test_cross_terms_below_the_smallest_float_are_counted(strategy, h):
  clip_norm = 1e-9
  batch = {
    'ids': jnp.zeros((1, 1), int),
    'h': jnp.full((1, 1, 4), h),
    'x': jnp.full((1, 1, 4), 1e-27),  # h x is too small for a float, g h x is not
    'g': jnp.full((1, 1, 5), 1e18),
  }
  result = compiled(tied, strategy, clip_norm=clip_norm)(jnp.zeros((5, 4)), batch)
  assert 0 < norm(result.sum) <= clip_norm * MARGIN


@both_strategies
def test_rounding_is_bounded_where_activations_are_too_small_to_square(rng, strategy):
  clip_norm = 1e-11
  for _ in range(20):
    batch = products(rng, 20, 1e-25, 1e18)
    # Tokens that cancel up to a rest: what rounding adds is large beside it.
    x = np.repeat(batch['x'], 2, axis=1)
    g = np.stack([batch['g'], -np.float32(1 + 1e-5) * batch['g']], axis=2).reshape(1, 40, 9)
    result = compiled(product, strategy, clip_norm=clip_norm)(jnp.zeros((8, 9)), {'x': x, 'g': g})
    assert 0 < norm(result.sum) <= clip_norm * MARGIN


@both_strategies
def test_a_weight_in_float16_is_not_lost_below_its_smallest_number(rng, strategy):
  def loss_fn(p, example):
    y = example['x'].astype(jnp.float16) @ p.astype(jnp.float16)
    return jnp.sum(y.astype(jnp.float32) * example['g'])

  # The more parameters, the smaller the weights at a product's two sides.
  x, g = rng.normal(size=(1, 3, 64)) * 1e-2, rng.normal(size=(1, 3, 72)) * 1e4
  batch = {'x': np.float32(x), 'g': np.float32(g)}
  result, expected = (clip(loss_fn, jnp.zeros((64, 72)), batch, s) for s in (strategy, 'vmap'))
  assert CLIP_NORM * (1 - 1e-3) <= norm(result.sum) <= CLIP_NORM * MARGIN
  # vmap rounds each product to float16 too.
  assert norm(difference(result.sum, expected.sum)) <= 5e-3


@both_strategies
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('tokens', [1, 3, 40])
def test_roundings_that_a_compiler_may_leave_out_do_not_come_between_norm_and_sum(
  rng, strategy, dtype, tokens
):
  def loss_fn(p, example):
    y = jnp.tanh(example['x'].astype(dtype) * dtype(1.01)) @ p.astype(dtype)
    y = jnp.exp(y * dtype(0.3)) * dtype(0.77)
    return jnp.sum(y.astype(jnp.float32) * example['g'])

  p = jnp.asarray(rng.normal(size=(8, 9)), jnp.float32)
  for _ in range(20):
    batch = products(rng, tokens, 1, 1e3)
    for in_haste in (True, False):
      result = compiled(loss_fn, strategy, in_haste)(p, batch)
      assert CLIP_NORM * 0.9 <= norm(result.sum) <= CLIP_NORM * MARGIN


def test_automatic_clipping_of_nothing_by_the_largest_factor_is_nothing():
  for strategy in privacy.CLIPPING_STRATEGIES:
    result = privacy.clipped_sum(
      lambda p, x: p * x,
      jnp.float32(0),
      jnp.zeros(2),
      clip_norm=1e38,
      clip_function=privacy.Automatic(gamma=1e-3),
      strategy=strategy,
    )
    assert result.sum == 0 and np.isfinite(result.factors).all()


# --- Parameters and inputs of odd types.


def row_gather(p, rows, mode):
  numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
  return lax.gather(p, rows[:, None], numbers, (1, p.shape[1]), mode=mode)


class Odd(NamedTuple):
  """A loss, its parameters and a batch of two examples."""

  loss_fn: Callable
  params: Any
  batch: Any
  fallback: bool = False


def _odd_cases():
  rng = np.random.default_rng(3)
  x, g = np.float32(rng.normal(size=(2, 3, 8))), np.float32(rng.normal(size=(2, 3, 9)))
  w = jnp.asarray(rng.normal(size=(8, 9)), jnp.float32)
  batch = {'x': x, 'g': g}

  def bytes_as_rows(dtype, mode):
    rows = np.array([[3, 100, 3], [0, 5, 127]]).astype(dtype)
    loss_fn = lambda p, e: jnp.sum(row_gather(p, e['rows'], mode) * e['g'])
    return Odd(loss_fn, jnp.zeros((300, 9)), {'rows': rows, 'g': g})

  def through(dtype):
    loss_fn = lambda p, e: jnp.sum((e['x'] @ p.astype(dtype).astype(jnp.float32)) * e['g'])
    return Odd(loss_fn, w, batch, fallback=True)

  def stopped_after_cast(p, e):
    y = e['x'].astype(jnp.bfloat16) @ p.astype(jnp.bfloat16)
    still = lax.stop_gradient(p.astype(jnp.bfloat16)) * jnp.bfloat16(2)
    return jnp.sum(y * e['g'].astype(jnp.bfloat16)) + jnp.sum(still)

  def of_two_types(p, e):
    y = e['x'].astype(p['wide'].dtype) @ p['wide'] + e['x'] @ p['narrow']
    return jnp.sum(y * e['g']).astype(jnp.float32)

  def integers_fed(p, e):
    y = lax.dot_general(e['x'], p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.sum(y * e['g'])

  return {
    'rows as int8, clipped': bytes_as_rows(np.int8, 'clip'),
    'rows as int8, filled': bytes_as_rows(np.int8, 'fill'),
    'rows as uint8': bytes_as_rows(np.uint8, None),
    'rows as int16': bytes_as_rows(np.int16, 'clip'),
    'through bfloat16': through(jnp.bfloat16),
    'through float16': through(jnp.float16),
    'through float8': through(jnp.float8_e4m3fn),
    'stopped after a cast': Odd(stopped_after_cast, w, batch),
    'two types': Odd(of_two_types, {'wide': np.float64(w), 'narrow': w}, batch),
    'no entries': Odd(
      lambda p, e: jnp.sum(e['x'] @ p['none']) + jnp.sum((e['x'] @ p['w']) * e['g']),
      {'none': jnp.zeros((8, 0)), 'w': w},
      batch,
    ),
    'fed integers': Odd(
      integers_fed, w, {'x': rng.integers(-99, 99, (2, 3, 8)).astype(np.int8), 'g': g}, True
    ),
  }


ODD = _odd_cases()


@both_strategies
@pytest.mark.parametrize('name', ODD)
def test_odd_types_give_what_vmap_gives(name, strategy):
  case = ODD[name]
  with jax.enable_x64(name == 'two types'):
    # XLA may take rows as bytes modulo 256 itself: the judge gets them as int32.
    widen = lambda x: x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) else x
    expected = clip(case.loss_fn, case.params, jax.tree.map(widen, case.batch), 'vmap')
    if case.fallback:
      with pytest.warns(privacy.ClippingFallbackWarning):
        actual = clip(case.loss_fn, case.params, case.batch, strategy)
    else:
      actual = clip(case.loss_fn, case.params, case.batch, strategy)
  tolerance = 2e-2 if name == 'stopped after a cast' else 1e-5
  actual, expected = jax.device_get((actual, expected))
  assert_close(actual, expected, tolerance)
  assert (expected.factors < 1).all()


@pytest.mark.parametrize('strategy', ['auto', *privacy.CLIPPING_STRATEGIES])
@pytest.mark.parametrize('dtype', [jnp.complex64, jnp.int32, jnp.float8_e4m3fn])
def test_parameters_of_other_types_are_refused_by_name(strategy, dtype):
  params = {'fine': jnp.zeros(3), 'layer': {'w': jnp.zeros(3, dtype)}}
  with pytest.raises(ValueError, match=f'parameter layer/w is {jnp.dtype(dtype)}; allowed: bfl'):
    privacy.clipped_sum(
      lambda p, x: jnp.sum(p['fine']) * x, params, jnp.ones(2), clip_norm=1.0, strategy=strategy
    )


@pytest.mark.parametrize(
  'mask', [np.ones(2), np.ones(2, int), np.ones(3, bool), np.ones((2, 1), bool), np.bool_(True)]
)
@pytest.mark.parametrize('function', [privacy.clipped_sum, privacy.plain_sum])
def test_a_mask_that_is_not_a_bool_an_example_is_refused(mask, function):
  kwargs = {'clip_norm': 1.0} if function is privacy.clipped_sum else {}
  with pytest.raises(ValueError, match=r'mask is .*; it must be bool \(2,\)'):
    function(lambda p, x: p * x, jnp.float32(1), jnp.ones(2), mask, **kwargs)


@pytest.mark.parametrize('sizes', [(2, 3), (2, None)])
def test_a_batch_whose_leaves_differ_in_size_is_refused(sizes):
  batch = [jnp.ones(() if size is None else size) for size in sizes]
  with pytest.raises(ValueError, match='batch has leading axes'):
    privacy.clipped_sum(lambda p, x: p * x[0], jnp.float32(1), batch, clip_norm=1.0)


# --- Temporaries cut up.


@both_strategies
@pytest.mark.parametrize('limit', [1, 200])
@pytest.mark.parametrize(
  'name',
  ['dense_on_tokens', 'conv_2d', 'conv_grouped', 'tied_embedding', 'lookups', 'shared_layers',
   'scan_over_layers', 'scan_over_time', 'experts'],
)  # fmt: skip
def test_temporaries_in_blocks_change_nothing(rng, monkeypatch, name, limit, strategy):
  build = zoo.ZOO[name]
  batch, mask = build().make_batch(rng, BATCH), random_mask(rng)
  scale = half_clipped(build, np.float64, batch, mask)
  expected = program(build, 'vmap', np.float64).call(batch, mask, scale)
  monkeypatch.setattr(outer_products, 'MAX_TEMPORARY_BYTES', limit)
  with jax.enable_x64(True):
    loss_fn = lambda params, example: scale * build().loss_fn(params, example)
    jitted = jax.jit(
      lambda *args: privacy.clipped_sum(loss_fn, *args, clip_norm=CLIP_NORM, strategy=strategy),
      compiler_options=haste(),
    )
    actual = jax.device_get(jitted(build().params, batch, mask))
  assert_close(actual, expected, 1e-10)
