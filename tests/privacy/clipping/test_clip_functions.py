"""Clip functions: what they compute, and that no scaled norm is above C."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy.clipping import clip_functions
from tests.privacy.clipping.programs import INF, MARGIN, NAN, norm

FUNCTIONS = [privacy.Clip(), privacy.Automatic(), privacy.Automatic(gamma=5.0)]


@pytest.mark.parametrize('function', FUNCTIONS, ids=str)
@pytest.mark.parametrize('clip_norm', [1e-6, 1.0, 1e6])
def test_a_scaled_norm_is_at_most_clip_norm(rng, function, clip_norm):
  norms = np.float32(np.concatenate([[0, clip_norm], 10 ** rng.uniform(-12, 15, 1000)]))
  factors = np.asarray(jax.jit(lambda n: function(n, clip_norm))(norms), np.float64)
  assert np.all(factors >= 0) and np.all(np.isfinite(factors))
  assert np.max(factors * norms) <= clip_norm * (1 + 3e-7)


def test_clip_leaves_small_gradients_and_scales_large_ones_to_clip_norm(rng):
  norms = np.float32(10 ** rng.uniform(-3, 3, 100))
  np.testing.assert_allclose(privacy.Clip()(norms, 2.0), np.minimum(1, 2 / norms), rtol=1e-6)


def test_automatic_is_clip_norm_over_norm_plus_gamma(rng):
  norms = np.float32(10 ** rng.uniform(-3, 3, 100))
  np.testing.assert_allclose(privacy.Automatic(0.5)(norms, 2.0), 2 / (norms + 0.5), rtol=1e-6)


@pytest.mark.parametrize('gamma', [0.0, -1.0, 1e-20, float('inf'), float('nan')])
def test_gamma_must_be_positive_and_finite(gamma):
  with pytest.raises(ValueError, match='gamma is .*positive'):
    privacy.Automatic(gamma)


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_the_sum_is_scaled_by_the_factors_that_come_back(rng, strategy):
  loss_fn = lambda params, x: params @ x
  params, batch = np.zeros(3, np.float32), np.float32(rng.normal(size=(6, 3)))
  mask = np.arange(6) != 2
  result = privacy.clipped_sum(
    loss_fn,
    params,
    batch,
    mask,
    clip_norm=0.7,
    clip_function=privacy.Automatic(),
    strategy=strategy,
  )
  norms = np.linalg.norm(batch, axis=1) * mask
  np.testing.assert_allclose(result.norms, norms, rtol=1e-6)
  np.testing.assert_allclose(result.factors, mask * 0.7 / (norms + 0.01), rtol=1e-5)
  np.testing.assert_allclose(result.sum, np.asarray(result.factors) @ batch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
@pytest.mark.parametrize('entry', [1e-20, 3e-20, 1e-19, 1e-15])
def test_gradients_whose_squares_vanish_stay_within_clip_norm(strategy, entry):
  clip_function = privacy.Automatic(clip_functions.SMALLEST_GAMMA)
  result = privacy.clipped_sum(
    lambda p, x: jnp.sum(p['direct'] * x) + jnp.sum(jnp.outer(x[:90], x[:90]) * p['w']) * 1e10,
    {'direct': jnp.zeros(10_000), 'w': jnp.zeros((90, 90))},
    jnp.full((1, 10_000), entry),
    clip_norm=1.0,
    clip_function=clip_function,
    strategy=strategy,
  )
  assert norm(result.sum) <= MARGIN


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_factors_that_would_overflow_what_they_weigh_are_cut(strategy):
  result = privacy.clipped_sum(
    lambda p, e: jnp.sum((e['x'] @ p) * e['g']),
    jnp.zeros((4, 5)),
    {'x': jnp.full((1, 3, 4), 1e8), 'g': jnp.full((1, 3, 5), 1e-20)},
    clip_norm=1e30,
    clip_function=privacy.Automatic(0.01),
    strategy=strategy,
  )
  assert np.isfinite(result.sum).all() and np.any(result.sum)


# --- Whatever a clip function says.


def clip(batch, mask, clip_function, strategy):
  """By a loss with sites, formed gradients and direct ones, and by clip_norm 1."""
  return privacy.clipped_sum(
    lambda p, e: e['size'] * jnp.sum(jnp.tanh(e['x'] @ p['w'] + p['b']) @ p['v']),
    {'w': jnp.full((5, 7), 0.1), 'b': jnp.ones(7), 'v': jnp.ones((7, 1))},
    batch,
    mask,
    clip_norm=1.0,
    clip_function=clip_function,
    strategy=strategy,
  )


def of_sizes(rng, *sizes):
  """A batch whose gradients have norms of `sizes`, up to ten times more."""
  return {'x': np.float32(rng.uniform(-1, 1, (len(sizes), 2, 5))), 'size': np.float32(sizes)}


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
@pytest.mark.parametrize('value', [-0.3, NAN])
def test_a_factor_that_is_negative_or_nan_counts_as_zero(rng, strategy, value):
  # The first one is what a strategy might take for the factor of all.
  batch, good = of_sizes(rng, 1, 100, 1, 100), np.array([False, True, False, True])
  right = lambda norm, clip_norm: 0.1 * clip_norm / norm
  wrong = lambda norm, clip_norm: jnp.where(norm < 100, value, right(norm, clip_norm))
  result, expected = clip(batch, None, wrong, strategy), clip(batch, good, right, strategy)
  assert np.isfinite(result.norms).all()
  np.testing.assert_allclose(result.factors, expected.factors, rtol=1e-6)
  np.testing.assert_array_equal(result.factors > 0, good)
  for one, other in zip(jax.tree.leaves(result.sum), jax.tree.leaves(expected.sum), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_nothing_is_summed_where_all_factors_are_nan(rng, strategy):
  result = clip(of_sizes(rng, 1, 100, 1), None, lambda norm, clip_norm: NAN * norm, strategy)
  assert norm(result.sum) == 0 and not np.any(result.factors)


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_no_factor_takes_a_gradient_past_clip_norm(rng, strategy):
  result = clip(of_sizes(rng, 100), None, lambda norm, clip_norm: INF * norm, strategy)
  assert 1 - 1e-4 <= norm(result.sum) <= MARGIN


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_a_clip_function_sees_no_norm_but_one(rng, strategy):
  # Within C for each example, but by the largest norm of all.
  of_all = lambda norms, clip_norm: clip_norm / jnp.max(norms)
  result = clip(of_sizes(rng, 1, 100), None, of_all, strategy)
  np.testing.assert_allclose(result.factors, 1 / result.norms, rtol=1e-3)
