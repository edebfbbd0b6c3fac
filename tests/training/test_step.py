"""The step against a direct slow version of DP-SGD, and its invariants."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpcap import privacy
from dpcap.training import step as step_lib
from dpcap.training.mesh import Layout, make_mesh

_BATCH, _EXPECTED, _CLIP, _SIGMA = 24, 20, 0.5, 0.7
_SHAPES = {
  'image': jax.ShapeDtypeStruct((4, 4, 3), np.uint8),
  'tokens': jax.ShapeDtypeStruct((3,), np.int32),
}


class Tiny(nn.Module):
  """Loss of one example: a linear map from pixels to the first token."""

  INPUTS = ('image', 'tokens')

  @nn.compact
  def __call__(self, image, tokens):
    self.variable('frozen', 'scale', lambda: jnp.full((), 2.0))
    scale = self.get_variable('frozen', 'scale')
    out = nn.Dense(5)(image.reshape(*image.shape[:-3], -1))
    return optax.softmax_cross_entropy_with_integer_labels(scale * out, tokens[..., 0])


def _plan(noise_multiplier=_SIGMA, **changes):
  settings = dict(
    dataset_size=1000, expected_batch_size=_EXPECTED, steps=10, delta=1e-3, clip_norm=_CLIP
  )
  return privacy.PrivacyPlan(noise_multiplier=noise_multiplier, **settings | changes)


@functools.cache
def _make(plan, clipping='auto', clip_function=privacy.Clip()):
  optimizer = optax.sgd(1.0)
  model = Tiny()
  layout = Layout(make_mesh())
  state = step_lib.init_state(model, optimizer, layout, _SHAPES, seed=0)
  step = step_lib.make_step(model, optimizer, plan, layout, clipping, clip_function)
  return step, jax.device_get(state)


def _examples(rng, n=_BATCH):
  images = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
  return {'image': images, 'tokens': rng.integers(0, 5, (n, 3), dtype=np.int32)}


def _accumulate(step, state, examples, mask, physical):
  n = len(mask)
  fold = lambda x: x.reshape(1, n // physical, physical, *x.shape[1:])
  return step.accumulate(
    state,
    step.zero(state.params),
    jax.tree.map(fold, examples),
    fold(mask),
    np.array([n // physical]),
  )


def _total(accumulator):
  """The clipped sum over all rows."""
  return jax.tree.map(lambda x: x.sum(0), accumulator.sum.value())


def _direct_sum(state, examples, mask):
  """Clipped sum, one example at a time, in float64 numpy from float32 gradients."""
  loss_fn = step_lib.example_loss(Tiny(), state.frozen)
  total = jax.tree.map(lambda p: np.zeros(p.shape), state.params)
  for i in np.flatnonzero(mask):
    example = jax.tree.map(lambda x, i=i: x[i], examples)
    grad = jax.tree.map(np.float64, jax.grad(loss_fn)(state.params, example))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grad)))
    total = jax.tree.map(lambda t, g, c=min(1, _CLIP / norm): t + c * g, total, grad)
  return total


def _copy(state):
  return jax.tree.map(jnp.array, state)


@pytest.fixture(name='rng')
def _rng():
  seed = np.random.SeedSequence().entropy
  print('seed', seed)
  return np.random.default_rng(seed)


def _close(a, b, tolerance=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


@pytest.mark.parametrize('clipping', privacy.CLIPPING_STRATEGIES)
@pytest.mark.parametrize('physical', [1, 4, 24])
def test_accumulated_sum_equals_direct_sum_for_any_physical_batch(rng, physical, clipping):
  step, state = _make(_plan(), clipping)
  examples, mask = _examples(rng), rng.random(_BATCH) < 0.8
  accumulator = _accumulate(step, state, examples, mask, physical)
  _close(_total(accumulator), _direct_sum(state, examples, mask), 2e-5)
  assert accumulator.examples == mask.sum()


def test_clipped_examples_are_those_that_were_scaled_down(rng):
  examples, mask = _examples(rng), np.arange(_BATCH) < 20
  for clip_norm, count in ((1e-3, 20), (1e6, 0)):
    step, state = _make(_plan(clip_norm=clip_norm))
    assert _accumulate(step, state, examples, mask, 4).clipped == count


def test_automatic_clipping_gives_every_example_nearly_clip_norm(rng):
  step, state = _make(_plan(), clip_function=privacy.Automatic(gamma=1e-6))
  accumulator = _accumulate(step, state, _examples(rng), np.arange(_BATCH) < 1, 1)
  squares = [np.sum(np.square(g)) for g in jax.tree.leaves(_total(accumulator))]
  assert np.sqrt(sum(squares)) == pytest.approx(_CLIP, rel=1e-4)


def test_physical_batches_past_live_are_not_looked_at(rng):
  step, state = _make(_plan())
  examples, mask = _examples(rng), np.ones(_BATCH, bool)
  fold = lambda x: x.reshape(1, 6, 4, *x.shape[1:])
  args = jax.tree.map(fold, examples), fold(mask), np.array([2])
  accumulator = step.accumulate(state, step.zero(state.params), *args)
  assert accumulator.examples == 8
  _close(_total(accumulator), _direct_sum(state, examples, np.arange(_BATCH) < 8), 2e-5)


@pytest.mark.parametrize('drawn', [0, 3, 24])
def test_update_divides_by_expected_not_sampled_batch_size(rng, drawn):
  step, state = _make(_plan())
  examples, mask = _examples(rng), np.arange(_BATCH) < drawn
  accumulator = _accumulate(step, state, examples, mask, 4)
  key = jax.random.key(int(rng.integers(1 << 31)))
  noisy, _ = _plan().make_mechanism().add_noise(key, 0, _total(accumulator), ())
  expected = jax.tree.map(lambda p, g: p - g / _EXPECTED, state.params, noisy)
  new_state, _, _, _ = step.update(_copy(state), accumulator, key, ())
  _close(new_state.params, expected)
  assert new_state.step == 1


def test_noise_is_added_once_however_many_physical_batches(rng):
  """The variance of the released sum is (sigma C)^2, for 1 and for 24 physical batches."""
  step, state = _make(_plan())
  examples, mask = _examples(rng), np.zeros(_BATCH, bool)
  for physical in (1, 24):
    noise = []
    for _ in range(30):
      accumulator = _accumulate(step, state, examples, mask, physical)
      new, _, _, _ = step.update(
        _copy(state), accumulator, jax.random.key(int(rng.integers(1 << 31))), ()
      )
      moved = jax.tree.map(lambda a, b: (a - b) * _EXPECTED, state.params, new.params)
      noise += [np.ravel(x) for x in jax.tree.leaves(moved)]
    noise = np.concatenate(noise)
    # About 7,000 draws: the deviation is known to 0.9%; allow six times that.
    np.testing.assert_allclose(noise.std(), _SIGMA * _CLIP, rtol=0.055)


def test_noise_differs_between_steps_and_repeats_on_replay(rng):
  step, state = _make(_plan())
  accumulate = lambda: _accumulate(step, state, _examples(rng), np.zeros(_BATCH, bool), 4)
  key = jax.random.key(1)
  update = lambda s: step.update(_copy(state._replace(step=np.int32(s))), accumulate(), key, ())
  first, again, second = update(0)[0], update(0)[0], update(1)[0]
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
  assert not np.allclose(jax.tree.leaves(first.params)[1], jax.tree.leaves(second.params)[1])


def test_the_digest_is_that_of_what_is_released(rng):
  step, state = _make(_plan())
  accumulator = _accumulate(step, state, _examples(rng), np.ones(_BATCH, bool), 4)
  key = jax.random.key(3)
  noisy, _ = jax.jit(_plan().make_mechanism().add_noise)(key, 0, _total(accumulator), ())
  *_, digest = step.update(_copy(state), accumulator, key, ())
  np.testing.assert_array_equal(digest, privacy.digest(noisy))


def test_frozen_tensors_never_move(rng):
  step, state = _make(_plan())
  accumulator = _accumulate(step, state, _examples(rng), np.ones(_BATCH, bool), 4)
  new, _, _, _ = step.update(_copy(state), accumulator, jax.random.key(0), ())
  jax.tree.map(np.testing.assert_array_equal, new.frozen, state.frozen)


def test_non_finite_loss_contributes_zero_and_is_counted(rng):
  step, state = _make(_plan())
  params = jax.tree.map(
    lambda p: np.where(np.arange(p.size).reshape(p.shape) == 0, np.inf, p), state.params
  )
  accumulator = _accumulate(
    step, state._replace(params=params), _examples(rng), np.ones(_BATCH, bool), 4
  )
  assert accumulator.unusable == _BATCH
  assert all(np.all(g == 0) for g in jax.tree.leaves(_total(accumulator)))
  new, _, diagnostics, _ = step.update(_copy(state), accumulator, jax.random.key(0), ())
  assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(new.params))
  assert diagnostics['unusable_gradients'] == _BATCH


def test_step_without_privacy_is_the_plain_gradient(rng):
  plan = privacy.calibrate(
    epsilon=np.inf,
    dataset_size=1000,
    expected_batch_size=_EXPECTED,
    steps=10,
    delta=1e-3,
    clip_norm=_CLIP,
  )
  step, state = _make(plan)
  examples = _examples(rng)
  accumulator = _accumulate(step, state, examples, np.ones(_BATCH, bool), 4)
  new, _, _, _ = step.update(_copy(state), accumulator, jax.random.key(0), ())
  loss_fn = step_lib.example_loss(Tiny(), state.frozen)
  total = jax.grad(
    lambda p: sum(loss_fn(p, jax.tree.map(lambda x, i=i: x[i], examples)) for i in range(_BATCH))
  )
  expected = jax.tree.map(lambda p, g: p - g / _EXPECTED, state.params, total(state.params))
  _close(new.params, expected, 2e-5)


def test_a_simulation_clips_and_adds_noise_and_divides_by_its_own_batch(rng):
  plan = _plan().simulation(5)
  step, state = _make(plan)
  examples, mask = _examples(rng), np.arange(_BATCH) < 6
  accumulator = _accumulate(step, state, examples, mask, 4)
  _close(_total(accumulator), _direct_sum(state, examples, mask), 2e-5)
  key = jax.random.key(int(rng.integers(1 << 31)))
  own = privacy.MECHANISMS['gaussian'](_SIGMA / 5, _CLIP)
  noisy, _ = own.add_noise(key, 0, _total(accumulator), ())
  new, _, _, _ = step.update(_copy(state), accumulator, key, ())
  _close(new.params, jax.tree.map(lambda p, g: p - g / (_EXPECTED / 5), state.params, noisy))


def test_one_compiled_program_serves_every_draw(rng):
  step, state = _make(_plan())
  for live in (1, 3, 6):
    examples = jax.tree.map(lambda x: x.reshape(1, 6, 4, *x.shape[1:]), _examples(rng))
    mask = np.ones((1, 6, 4), bool)
    step.accumulate(state, step.zero(state.params), examples, mask, np.array([live]))
  compiled = step.accumulate._cache_size()
  step.accumulate(
    state, step.zero(state.params), examples, rng.random((1, 6, 4)) < 0.5, np.array([5])
  )
  assert step.accumulate._cache_size() == compiled


def test_noise_key_is_no_constant_of_the_compiled_program():
  step, state = _make(_plan())
  keys = privacy.Keys((0x12345678, 0x1ABCDEF0), (1, 2))
  lowered = step.update.lower(state, step.zero(state.params), keys.noise_key(), ()).as_text()
  assert str(0x12345678) not in lowered and str(0x1ABCDEF0) not in lowered


def test_views_of_a_record_are_one_gradient(rng):
  """Their mean is clipped as a whole: what K views add is bounded as one view is."""
  views = jax.tree.map(lambda x: x.reshape(_BATCH // 3, 3, *x.shape[1:]), _examples(rng))
  mask, clip_norm = np.ones(_BATCH // 3, bool), 12.0
  made = {name: _make(_plan(clip_norm=clip_norm), name) for name in privacy.CLIPPING_STRATEGIES}
  _, state = made['vmap']  # all begin alike
  gradient = jax.jit(jax.grad(step_lib.example_loss(Tiny(), state.frozen)))
  total = jax.tree.map(lambda p: np.zeros(p.shape), state.params)
  for i in range(len(mask)):
    of_view = lambda j, i=i: gradient(state.params, jax.tree.map(lambda x: x[i, j], views))
    mean = jax.tree.map(lambda *g: np.mean(np.float64(g), axis=0), *map(of_view, range(3)))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(mean)))
    total = jax.tree.map(lambda t, g, c=min(1, clip_norm / norm): t + c * g, total, mean)
  for step, state in made.values():
    accumulator = _accumulate(step, state, views, mask, 4)
    assert 0 < accumulator.clipped < len(mask)
    _close(_total(accumulator), total, 2e-4)


def test_the_average_of_parameters_forgets_faster_early_on(rng):
  layout, decay = Layout(make_mesh()), 0.5
  plan = _plan(noise_multiplier=0.5)
  optimizer = optax.sgd(1.0)
  state = step_lib.init_state(Tiny(), optimizer, layout, _SHAPES, 0, averaged=True)
  step = step_lib.make_step(Tiny(), optimizer, plan, layout, ema_decay=decay)
  expected = jax.tree.map(np.float64, state.params)
  for t in range(12):
    accumulator = _accumulate(step, state, _examples(rng), np.ones(_BATCH, bool), 12)
    state, *_ = step.update(state, accumulator, jax.random.key(t), ())
    kept = min(decay, (1 + t) / (10 + t))
    expected = jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, expected, state.params)
    _close(state.average, expected)
  assert any(np.any(a != p) for a, p in zip(*map(jax.tree.leaves, (state.average, state.params))))
  assert state.variables['params'] is state.average
