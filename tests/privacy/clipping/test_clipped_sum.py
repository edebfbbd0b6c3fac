"""Clipping against a numpy float64 loop and jax-privacy, and the sensitivity it promises."""

import doctest
import functools

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy import clipping
from dpcap.privacy.clipping.gradient_norms import GradientNorms
from tests.privacy.clipping.programs import INF, MARGIN, NAN, assert_identical, difference, norm

VOCAB, WIDTH, OUT, LENGTH, BATCH = 7, 5, 4, 6, 8
EPS = 1e-5  # of the layer norm


@pytest.fixture(params=privacy.CLIPPING_STRATEGIES)
def strategy(request):
  """Every strategy is held to every property."""
  return request.param


def loss_fn(params, example):
  """Embedding, layer norm, dense, tanh, mean over tokens, squared error times `weight`.

  `weight` scales an example's gradient; `poison` is the gradient of one coordinate.
  """
  x = params['embedding'][example['tokens']]
  x = x - x.mean(-1, keepdims=True)
  x = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPS)
  x = x * params['norm']['scale'] + params['norm']['bias']
  x = jnp.tanh(x @ params['dense']['kernel'] + params['dense']['bias']).mean(0)
  error = jnp.sum(jnp.square(x - example['target'])) / 2
  return example['weight'] * error + example['poison'] * params['extra'][1]


def numpy_gradient(params, example):
  """The gradient of loss_fn, derived by hand, in float64."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  tokens = example['tokens']
  h = p['embedding'][tokens]
  h = h - h.mean(-1, keepdims=True)
  std = np.sqrt(np.mean(h**2, -1, keepdims=True) + EPS)
  n = h / std
  y = n * p['norm']['scale'] + p['norm']['bias']
  a = np.tanh(y @ p['dense']['kernel'] + p['dense']['bias'])
  d_mean = float(example['weight']) * (a.mean(0) - example['target'].astype(np.float64))
  d_z = d_mean / len(tokens) * (1 - a**2)
  d_y = d_z @ p['dense']['kernel'].T
  d_n = d_y * p['norm']['scale']
  d_h = (d_n - d_n.mean(-1, keepdims=True) - n * np.mean(d_n * n, -1, keepdims=True)) / std
  d_embedding = np.zeros_like(p['embedding'])
  np.add.at(d_embedding, tokens, d_h)
  return {
    'embedding': d_embedding,
    'norm': {'scale': (d_y * n).sum(0), 'bias': d_y.sum(0)},
    'dense': {'kernel': y.T @ d_z, 'bias': d_z.sum(0)},
    'extra': np.array([0.0, float(example['poison']), 0.0]),
  }


def make_params(rng, dtype=jnp.float32):
  shapes = {
    'embedding': (VOCAB, WIDTH),
    'norm': {'scale': (WIDTH,), 'bias': (WIDTH,)},
    'dense': {'kernel': (WIDTH, OUT), 'bias': (OUT,)},
    'extra': (3,),
  }
  # Small enough that no tanh saturates: float32 would lose its derivative.
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.uniform(-0.6, 0.6, shape), dtype),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def make_batch(rng, size=BATCH, weights=None):
  """A batch of numpy arrays; gradients get norms of about `weights` (default: near 1)."""
  if weights is None:
    weights = rng.lognormal(sigma=1.5, size=size)
  return {
    'tokens': rng.integers(VOCAB, size=(size, LENGTH)),
    'target': rng.normal(size=(size, OUT)).astype(np.float32) + 2,
    'weight': np.asarray(weights, np.float32),
    'poison': np.zeros(size, np.float32),
  }


def take(batch, index):
  return jax.tree.map(lambda leaf: leaf[index], batch)


@functools.cache
def jitted(strategy, clip_norm):
  """clipped_sum of loss_fn, compiled once per strategy, clip norm and input types."""
  return jax.jit(
    lambda params, batch, mask: privacy.clipped_sum(
      loss_fn, params, batch, mask, clip_norm=clip_norm, strategy=strategy
    )
  )


def direct_sum(params, batch, mask, clip_norm):
  """(sum, norms) by a loop over examples in float64."""
  total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
  norms = np.zeros(len(mask))
  for i in np.flatnonzero(mask):
    gradient = numpy_gradient(params, take(batch, i))
    norms[i] = norm(gradient)
    factor = min(1.0, clip_norm / norms[i])
    total = jax.tree.map(lambda t, g: t + factor * g, total, gradient)
  return total, norms


@pytest.mark.parametrize('clip_norm', [1e-4, 1.0, 1e4])
def test_equals_a_direct_loop_over_examples_in_float64(rng, strategy, clip_norm):
  for _ in range(4):
    params = make_params(rng)
    # Norms on both sides of clip_norm.
    batch = make_batch(rng, weights=clip_norm * rng.lognormal(sigma=1.5, size=BATCH))
    mask = rng.random(BATCH) < 0.7
    actual = jitted(strategy, clip_norm)(params, batch, mask)
    total, norms = direct_sum(params, batch, mask, clip_norm)
    assert norm(difference(actual.sum, total)) <= 3e-6 * clip_norm * BATCH
    np.testing.assert_allclose(actual.norms, norms, rtol=1e-5)
    losses = np.where(mask, jax.vmap(loss_fn, (None, 0))(params, batch), 0)
    np.testing.assert_allclose(actual.losses, losses, rtol=1e-5)


@pytest.mark.parametrize('clip_norm', [0.03, 1.0])
def test_equals_jax_privacy(rng, strategy, clip_norm):
  params, batch, mask = make_params(rng), make_batch(rng), rng.random(BATCH) < 0.7
  reference = jax_privacy.clipped_grad(loss_fn, l2_clip_norm=clip_norm, keep_batch_dim=False)
  expected = jax.jit(reference)(params, take(batch, np.flatnonzero(mask)))
  actual = jitted(strategy, clip_norm)(params, batch, mask).sum
  assert norm(difference(actual, expected)) <= 1e-5 * clip_norm * BATCH


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('clip_norm', [1e-4, 0.1, 1.0, 1e4])
def test_leaving_out_one_example_moves_the_sum_by_at_most_clip_norm(
  rng, strategy, clip_norm, dtype
):
  function = jitted(strategy, clip_norm)
  for _ in range(3):
    params = make_params(rng, dtype)
    batch = make_batch(rng, weights=10 ** rng.uniform(-10, 15, BATCH))
    mask = np.ones(BATCH, bool)
    whole = function(params, batch, mask)
    for i in range(BATCH):
      without = function(params, batch, mask & (np.arange(BATCH) != i)).sum
      assert norm(difference(whole.sum, without)) <= clip_norm * MARGIN
      # One alone: free of the rounding of other examples' sums.
      alone = function(params, batch, np.arange(BATCH) == i).sum
      assert norm(alone) <= clip_norm * MARGIN
      if whole.norms[i] > 1.001 * clip_norm:
        # Only rounding may take from it: vmap rounds nothing below float32 after the norm.
        exact = strategy == 'vmap' or dtype == jnp.float32
        assert norm(alone) >= clip_norm * (1 - (clipping.ROUNDING_MARGIN if exact else 0.05))


@pytest.mark.parametrize('scale', [1.1, 1e3, 1e12])
def test_a_large_gradient_is_scaled_to_norm_clip_norm(rng, strategy, scale):
  params, clip_norm = make_params(rng), 0.1
  batch = make_batch(rng, size=1, weights=[1.0])
  batch['weight'] *= np.float32(scale * clip_norm / norm(numpy_gradient(params, take(batch, 0))))
  actual = jitted(strategy, clip_norm)(params, batch, np.array([True])).sum
  assert norm(actual) == pytest.approx(clip_norm, rel=1e-5)
  # Scaled, not turned.
  direction = numpy_gradient(params, take(batch, 0))
  direction = jax.tree.map(lambda g: g * clip_norm / norm(direction), direction)
  assert norm(difference(actual, direction)) <= 1e-5 * clip_norm


def test_the_norm_of_a_wide_parameter_does_not_lose_its_small_terms(strategy):
  # Adding one by one in float32 would stop growing at 2**24 equal terms.
  width, clip_norm = 2**25, 1.0
  params = jnp.zeros(width)
  result = jax.jit(
    lambda params, batch: privacy.clipped_sum(
      lambda p, x: x * jnp.sum(p), params, batch, clip_norm=clip_norm, strategy=strategy
    )
  )(params, jnp.array([1.37]))
  assert norm(result.sum) == pytest.approx(clip_norm, rel=1e-5)


def test_a_small_gradient_is_left_exactly_as_it_is(rng, strategy):
  params, batch = make_params(rng), make_batch(rng)
  single = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, batch)
  for i in range(BATCH):
    actual = jitted(strategy, 1e4)(params, batch, np.arange(BATCH) == i).sum
    assert norm(actual) > 0
    # The same bits up to how a compiler orders the one backward pass.
    assert norm(difference(actual, take(single, i))) <= 1e-6 * norm(actual)
  powers = np.float32(2.0) ** rng.integers(-40, -1, 50)
  for x in powers:
    result = privacy.clipped_sum(
      lambda p, x: p * x, jnp.float32(0), jnp.array([x]), clip_norm=1.0, strategy=strategy
    )
    assert result.sum == x


def test_a_loss_that_is_a_parameter_has_its_gradient(strategy):
  loss_fn = lambda params, x: params['w'][1]
  params = {'w': jnp.ones(3), 'unused': jnp.ones(2)}
  result = privacy.clipped_sum(loss_fn, params, jnp.zeros((4, 5)), clip_norm=0.5, strategy=strategy)
  np.testing.assert_array_equal(result.norms, np.ones(4))
  np.testing.assert_array_equal(result.sum['w'], [0, 2, 0])
  assert not result.sum['unused'].any()


def test_a_zero_gradient_contributes_zero(rng, strategy):
  batch = make_batch(rng, weights=np.zeros(BATCH))
  result = jitted(strategy, 1.0)(make_params(rng), batch, np.ones(BATCH, bool))
  assert norm(result.sum) == 0
  assert not result.norms.any()


@pytest.mark.parametrize(
  'key, value',
  [
    ('weight', NAN),
    ('weight', INF),
    ('weight', 1e38),  # its square overflows
    ('weight', 1e22),
    ('target', NAN),
    ('target', -INF),
    ('poison', NAN),  # of one coordinate; all others are finite
    ('poison', -INF),
    ('poison', 1e20),
  ],
)
def test_an_unusable_gradient_contributes_exactly_zero_to_every_parameter(
  rng, strategy, key, value
):
  params, batch = make_params(rng), make_batch(rng)
  function = jitted(strategy, 1.0)
  bad = np.arange(BATCH) == rng.integers(BATCH)
  expected = function(params, batch, ~bad)
  batch[key][bad] = value
  actual = function(params, batch, np.ones(BATCH, bool))
  assert_identical(actual.sum, expected.sum)
  np.testing.assert_array_equal(actual.norms[~bad], expected.norms[~bad])
  assert not np.isfinite(actual.norms[bad])
  assert norm(function(params, batch, bad).sum) == 0


def test_a_masked_example_contributes_exactly_zero_whatever_it_holds(rng, strategy):
  params, batch = make_params(rng), make_batch(rng)
  function = jitted(strategy, 1.0)
  mask = np.arange(BATCH) % 3 != 1
  expected = function(params, batch, mask)
  batch['target'][~mask] = NAN
  batch['weight'][~mask] = INF
  batch['poison'][~mask] = NAN
  actual = function(params, batch, mask)
  assert_identical(actual, expected)
  assert not actual.norms[~mask].any() and not actual.losses[~mask].any()
  nothing = function(params, batch, np.zeros(BATCH, bool))
  assert norm(nothing.sum) == 0


def test_an_example_does_not_depend_on_its_neighbours(rng, strategy):
  params, batch = make_params(rng), make_batch(rng)
  order = rng.permutation(BATCH)
  function, mask = jitted(strategy, 1.0), np.ones(BATCH, bool)
  one, other = function(params, batch, mask), function(params, take(batch, order), mask)
  np.testing.assert_allclose(other.norms, one.norms[order], rtol=1e-6)
  assert norm(difference(one.sum, other.sum)) <= 1e-5


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_the_sum_is_float32_shaped_as_the_parameters(rng, strategy, dtype):
  params = make_params(rng, dtype)
  result = jitted(strategy, 1.0)(params, make_batch(rng), np.ones(BATCH, bool))
  jax.tree.map(lambda s, p: np.testing.assert_equal(s.shape, p.shape), result.sum, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(result.sum)} == {np.dtype(np.float32)}
  assert result.norms.shape == result.losses.shape == (BATCH,)


@pytest.mark.parametrize('physical', [1, 3, 8, 12, 32])
def test_accumulation_over_physical_batches_of_any_size_gives_the_same_sum(rng, strategy, physical):
  params, size = make_params(rng), 12
  batch, mask = make_batch(rng, size), rng.random(size) < 0.8
  expected, norms = direct_sum(params, batch, mask, 1.0)
  count = -(-size // physical)
  pad = lambda x: np.concatenate([x, np.repeat(x[:1], count * physical - size, axis=0)])
  batch = jax.tree.map(pad, batch)
  padded_mask = np.concatenate([mask, np.zeros(count * physical - size, bool)])
  split = lambda x: x.reshape(count, physical, *x.shape[1:])

  @jax.jit
  def accumulate(params, batches, masks):
    def body(i, carry):
      total, norms = carry
      one = jitted(strategy, 1.0)(params, take(batches, i), masks[i])
      return jax.tree.map(jnp.add, total, one.sum), norms.at[i].set(one.norms)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    return jax.lax.fori_loop(0, count, body, (zeros, jnp.zeros((count, physical))))

  total, actual_norms = accumulate(
    params, jax.tree.map(lambda x: jnp.asarray(split(x)), batch), jnp.asarray(split(padded_mask))
  )
  assert norm(difference(total, expected)) <= 1e-5 * size
  np.testing.assert_allclose(actual_norms.reshape(-1)[:size], norms, rtol=1e-5)


def test_without_a_mask_all_examples_count(rng, strategy):
  params, batch = make_params(rng), make_batch(rng)
  actual = jax.jit(
    lambda *args: privacy.clipped_sum(loss_fn, *args, clip_norm=1.0, strategy=strategy)
  )(params, batch)
  expected, norms = direct_sum(params, batch, np.ones(BATCH, bool), 1.0)
  assert norm(difference(actual.sum, expected)) <= 1e-5 * BATCH
  np.testing.assert_allclose(actual.norms, norms, rtol=1e-5)


@pytest.mark.parametrize('clip_function', [privacy.Clip(), privacy.Automatic()])
@pytest.mark.parametrize('clip_norm', [1e-12, 1.0, 1e4])
def test_what_is_flushed_finds_room_within_clip_norm(rng, monkeypatch, clip_norm, clip_function):
  # At clip_norm 1e-12, gradients of 1e19 over a thousand tokens flush several hundredths of it.
  monkeypatch.setitem(clipping.CLIPPING_STRATEGIES, 'factors', lambda problem: problem.factor_of)
  factor_of = privacy.clipped_sum(
    loss_fn, make_params(rng), make_batch(rng), clip_norm=clip_norm, clip_function=clip_function,
    strategy='factors',
  )  # fmt: skip
  norms, flushed = np.meshgrid(np.geomspace(1e-3, 1e19, 23), [0, 1e-6, 0.03, 0.5, 1, 7])
  of = GradientNorms(*map(jnp.float32, (norms, norms, flushed * clip_norm)))
  factors = np.float64(factor_of(of))
  # A weight of zero flushes nothing.
  contributions = factors * norms / clip_norm + flushed * (factors > 0)
  assert np.max(contributions) <= MARGIN
  # And no more than it takes.
  np.testing.assert_allclose(contributions[:4, -1], 1, rtol=1e-5)


@pytest.mark.parametrize('clip_norm', [0.0, -1.0, 1e-13, INF, NAN])
def test_a_wrong_clip_norm_is_refused(rng, clip_norm):
  with pytest.raises(ValueError, match=f'clip_norm is {clip_norm}.*finite and at least'):
    privacy.clipped_sum(loss_fn, make_params(rng), make_batch(rng), clip_norm=clip_norm)


def test_an_unknown_strategy_is_refused_and_the_known_ones_are_named(rng):
  with pytest.raises(ValueError, match="'magic'; allowed: .*vmap"):
    privacy.clipped_sum(loss_fn, make_params(rng), make_batch(rng), clip_norm=1.0, strategy='magic')


plain = jax.jit(lambda params, batch, mask: privacy.plain_sum(loss_fn, params, batch, mask))


def test_plain_sum_is_the_gradient_of_the_summed_loss(rng):
  params, batch, mask = make_params(rng), make_batch(rng), rng.random(BATCH) < 0.7
  expected, _ = direct_sum(params, batch, mask, INF)
  actual = plain(params, batch, mask)
  assert norm(difference(actual.sum, expected)) <= 1e-5 * (1 + norm(expected))
  losses = np.where(mask, jax.vmap(loss_fn, (None, 0))(params, batch), 0)
  np.testing.assert_allclose(actual.losses, losses, rtol=1e-5)
  assert np.isnan(actual.norms).all()


def test_plain_sum_is_float32_for_bfloat16_parameters(rng):
  result = plain(make_params(rng, jnp.bfloat16), make_batch(rng), np.ones(BATCH, bool))
  assert {leaf.dtype for leaf in jax.tree.leaves(result.sum)} == {np.dtype(np.float32)}


@pytest.mark.parametrize('value', [NAN, INF])
def test_plain_sum_drops_the_examples_whose_gradient_is_not_finite(rng, value):
  params, batch = make_params(rng), make_batch(rng)
  bad = np.arange(BATCH) % 4 == 1
  expected = plain(params, batch, ~bad)
  batch['poison'][bad] = value
  actual = plain(params, batch, np.ones(BATCH, bool))
  assert norm(difference(actual.sum, expected.sum)) <= 1e-6 * norm(expected.sum)
  np.testing.assert_array_equal(actual.factors, ~bad)
  nothing = plain(params, batch, bad)
  assert norm(nothing.sum) == 0 and not nothing.factors.any()


@pytest.mark.parametrize('function', ['plain', *privacy.CLIPPING_STRATEGIES])
def test_nothing_comes_of_an_empty_batch(function):
  loss = lambda p, x: jnp.sum(x @ p['w'] + p['b'])
  params, batch = {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)}, jnp.zeros((0, 3))
  if function == 'plain':
    result = privacy.plain_sum(loss, params, batch)
  else:
    result = privacy.clipped_sum(loss, params, batch, clip_norm=1.0, strategy=function)
  assert jax.tree.map(jnp.shape, result.sum) == {'w': (3, 2), 'b': (2,)}
  assert norm(result.sum) == 0
  assert result.norms.shape == result.factors.shape == result.losses.shape == (0,)


@pytest.mark.parametrize('function', ['plain', *privacy.CLIPPING_STRATEGIES])
@pytest.mark.parametrize('params', [{}, {'unused': jnp.ones(3)}])
def test_a_loss_without_gradient_sums_to_zero(function, params):
  loss = lambda p, x: jnp.sum(x)
  if function == 'plain':
    result = privacy.plain_sum(loss, params, jnp.ones((2, 3)))
  else:
    result = privacy.clipped_sum(loss, params, jnp.ones((2, 3)), clip_norm=1.0, strategy=function)
  assert norm(result.sum) == 0
  np.testing.assert_array_equal(result.losses, [3, 3])


@pytest.mark.parametrize('shape', [(2,) * 18, (2**18,), (3, 5, 7, 11, 13, 17)])
def test_the_norm_of_a_large_parameter_counts_all_its_entries(strategy, shape):
  result = privacy.clipped_sum(
    lambda p, x: jnp.sum(p) * x, jnp.zeros(shape), jnp.full(1, 1.2345), clip_norm=1.0,
    strategy=strategy,
  )  # fmt: skip
  assert 1 - 1e-5 <= norm(result.sum) <= 1 + 1e-5


def test_plain_sum_is_untouched_by_what_a_masked_example_holds(rng):
  params, batch = make_params(rng), make_batch(rng)
  mask = np.arange(BATCH) % 3 != 1
  expected = plain(params, batch, mask)
  batch['target'][~mask] = NAN
  actual = plain(params, batch, mask)
  assert_identical(actual.sum, expected.sum)
  assert_identical(actual.losses, expected.losses)


def test_the_example_in_the_package_docstring_runs():
  failures, tests = doctest.testmod(privacy)
  assert tests and not failures


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)  # what is closed over comes with it
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


@pytest.mark.parametrize('prevent_cse', [True, False])
def test_remat_stays_as_its_author_set_it(strategy, prevent_cse):
  policy = jax.checkpoint_policies.dots_saveable
  layer = jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy, prevent_cse=prevent_cse)
  loss_fn = lambda w, x: jnp.sum(layer(w, jnp.sin(x)))
  clip = functools.partial(privacy.clipped_sum, loss_fn, clip_norm=1.0, strategy=strategy)
  jaxpr = jax.make_jaxpr(clip)(jnp.ones((3, 2)), jnp.ones((4, 5, 3)))
  found = [eqn.params for eqn in _equations(jaxpr.jaxpr) if 'prevent_cse' in eqn.params]
  assert found
  assert {(p['policy'], p['prevent_cse']) for p in found} == {(policy, prevent_cse)}
