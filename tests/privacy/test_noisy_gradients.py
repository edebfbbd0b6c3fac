"""Noisy gradients of data in memory: who is drawn, clipped, left out; never a step too many."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy

_N = 50


def _plan(**changes):
  options = dict(dataset_size=_N, expected_batch_size=20, steps=2, delta=1e-2, clip_norm=0.5)
  return privacy.PrivacyPlan(**options | {'noise_multiplier': 0.7} | changes)


def _examples():
  return np.random.default_rng().normal(size=(_N, 3)).astype(np.float32)


def _loss(params, x):
  return jnp.dot(params['w'], x)


@pytest.mark.parametrize('noisy', [True, False])
def test_is_the_sum_of_clipped_examples_and_noise_over_the_expected_batch(noisy):
  """Against a loop over examples, whose gradients are the examples themselves."""
  plan = _plan() if noisy else _plan(mechanism='none', noise_multiplier=0.0)
  examples, keys, usable = _examples(), privacy.Keys.from_seed(3), np.arange(_N) % 4 > 0
  examples[5] = np.nan  # its gradient is not finite: it is as if it could not be used
  params = {'w': jnp.ones(3)}
  gradients = privacy.NoisyGradients(plan, keys, _loss, examples, usable, physical_batch=8)
  sampler, mechanism = plan.make_sampler(keys.sampling), plan.make_mechanism()
  for step in range(plan.steps):
    expected = np.zeros(3)
    for i in sampler.draw(step).tolist():
      if usable[i] and i != 5:
        norm = np.linalg.norm(examples[i].astype(np.float64))
        expected += examples[i] * (min(1, 0.5 / norm) if noisy else 1)
    noise, _ = mechanism.add_noise(keys.noise_key(), step, {'w': jnp.zeros(3)}, ())
    assert noisy == bool(np.any(noise['w']))
    found = gradients(params)['w']
    np.testing.assert_allclose(found, (expected + noise['w']) / 20, atol=1e-6)


def test_an_example_that_is_never_usable_changes_nothing():
  keys, usable = privacy.Keys.from_seed(1), np.arange(_N) != 7
  plan = _plan(expected_batch_size=_N, steps=1)  # every example is drawn
  examples = _examples()
  other = examples.copy()
  other[7] = 1e30
  found = [
    privacy.NoisyGradients(plan, keys, _loss, x, usable)({'w': jnp.ones(3)})['w']
    for x in (examples, other)
  ]
  np.testing.assert_array_equal(*found)


def test_a_plan_has_so_many_steps():
  gradients = privacy.NoisyGradients(_plan(steps=1), privacy.Keys.from_seed(0), _loss, _examples())
  gradients({'w': jnp.ones(3)})
  with pytest.raises(ValueError, match='all 1 steps'):
    gradients({'w': jnp.ones(3)})


def test_a_step_that_failed_is_not_taken_again():
  """Its noise may have been seen: under other parameters it would give the gradient away."""
  gradients = privacy.NoisyGradients(_plan(steps=1), privacy.Keys.from_seed(0), _loss, _examples())
  with pytest.raises(KeyError):
    gradients({'v': jnp.ones(3)})
  with pytest.raises(ValueError, match='no more'):
    gradients({'w': jnp.ones(3)})


@pytest.mark.parametrize('length, usable', [(_N - 1, _N), (_N, _N + 1)])
def test_other_numbers_than_the_plan_says_are_refused(length, usable):
  with pytest.raises(ValueError, match='plan.dataset_size is 50'):
    privacy.NoisyGradients(
      _plan(), privacy.Keys.from_seed(0), _loss, _examples()[:length], np.ones(usable, bool)
    )


def test_a_longer_tree_is_checked_as_a_whole():
  trees = {'x': _examples(), 'y': jax.numpy.ones(3)}
  with pytest.raises(ValueError, match=r'\[\(3,\), \(50,\)\]'):
    privacy.NoisyGradients(_plan(), privacy.Keys.from_seed(0), _loss, trees)


@pytest.mark.parametrize(
  'options, reason',
  [
    ({'usable': np.ones(_N, int)}, r'usable is int64 \(50,\)'),
    ({'usable': np.ones((_N, 1), bool)}, r'usable is bool \(50, 1\)'),
    ({'physical_batch': -8}, 'physical_batch is -8'),  # no batch at all: noise and nothing else
    ({'physical_batch': 0}, 'physical_batch is 0'),
  ],
)
def test_options_that_cannot_be_are_refused_before_a_step_is_taken(options, reason):
  with pytest.raises(ValueError, match=reason):
    privacy.NoisyGradients(_plan(), privacy.Keys.from_seed(0), _loss, _examples(), **options)


def _row(gradients):
  return lambda w: gradients({'w': w})['w']


@pytest.mark.parametrize(
  'inside',
  [
    lambda gradients: jax.jit(_row(gradients))(jnp.ones(3)),
    lambda gradients: jax.jit(lambda: _row(gradients)(np.ones(3, np.float32)))(),
    lambda gradients: jax.vmap(_row(gradients))(jnp.ones((2, 3))),
    lambda gradients: jax.jvp(_row(gradients), (jnp.ones(3),), (jnp.ones(3),)),
    lambda gradients: jax.lax.fori_loop(0, 2, lambda _, w: _row(gradients)(w), jnp.ones(3)),
  ],
  ids=['jit', 'jit of a constant', 'vmap', 'jvp', 'loop'],
)
def test_no_transformation_repeats_a_draw_and_its_noise(inside):
  """Compiled once, a step would give one noise to all parameters; nor does that take a step."""
  gradients = privacy.NoisyGradients(_plan(steps=1), privacy.Keys.from_seed(0), _loss, _examples())
  with pytest.raises(ValueError, match='inside of a transformation'):
    inside(gradients)
  gradients({'w': jnp.ones(3)})


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, pickle.dumps])
def test_there_is_no_copy_that_repeats_the_noise(copied):
  gradients = privacy.NoisyGradients(_plan(), privacy.Keys.from_seed(0), _loss, _examples())
  with pytest.raises(TypeError, match='would repeat their noise'):
    copied(gradients)
