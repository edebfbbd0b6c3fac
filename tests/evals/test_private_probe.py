"""The private probe: what it adds up, clips, adds as noise, and says of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpcap import privacy
from dpcap.data import groups as groups_lib
from dpcap.errors import UserError
from dpcap.evals import private_probe
from dpcap.evals.features import Labelled
from dpcap.evals.knn import unit


def _plan(**changes):
  options = dict(
    dataset_size=60,
    expected_batch_size=20,
    steps=3,
    delta=1e-2,
    clip_norm=0.3,
    noise_multiplier=0.7,
  )
  return privacy.PrivacyPlan(**options | changes)


def _train():
  rng = np.random.default_rng()
  numbers = np.flatnonzero(np.arange(60) % 7 != 3)  # the others cannot be used
  x = rng.normal(size=(len(numbers), 4)).astype(np.float32)
  return Labelled(x, rng.integers(0, 3, len(numbers)), numbers)


def test_weights_are_those_of_a_loop_over_examples(monkeypatch):
  """Draws, clipping, noise and momentum, one example at a time in float64."""
  monkeypatch.setattr(private_probe, '_AT_ONCE', 8)
  plan, train, keys = _plan(), _train(), privacy.Keys.from_seed(5)
  found = private_probe.fit(plan, keys, train, 3, learning_rate=0.5)
  sampler, mechanism = plan.make_sampler(keys.sampling), plan.make_mechanism()
  place = {number: i for i, number in enumerate(train.numbers)}
  x = unit(train.features).astype(np.float64)
  w, b = np.zeros((4, 3)), np.zeros(3)
  trace_w, trace_b = np.zeros((4, 3)), np.zeros(3)
  zeros = {'w': jnp.zeros((4, 3)), 'b': jnp.zeros(3)}
  schedule = optax.cosine_decay_schedule(0.5, 3)
  for step in range(3):
    sum_w, sum_b = np.zeros((4, 3)), np.zeros(3)
    for number in sampler.draw(step).tolist():
      if number not in place:
        continue
      i = place[number]
      p = np.exp(x[i] @ w + b)
      d = p / p.sum() - np.eye(3)[train.labels[i]]
      gradient = np.outer(x[i], d)
      factor = min(1, 0.3 / np.sqrt(np.sum(gradient**2) + np.sum(d**2)))
      sum_w, sum_b = sum_w + factor * gradient, sum_b + factor * d
    noise, _ = mechanism.add_noise(keys.noise_key(), step, zeros, ())
    noise = jax.device_get(noise)
    assert np.abs(noise['w']).max() > 0
    trace_w = 0.9 * trace_w + (sum_w + noise['w']) / 20
    trace_b = 0.9 * trace_b + (sum_b + noise['b']) / 20
    w, b = w - float(schedule(step)) * trace_w, b - float(schedule(step)) * trace_b
  np.testing.assert_allclose(found['w'], w, atol=1e-5)
  np.testing.assert_allclose(found['b'], b, atol=1e-5)


def _evaluate(subject, **changes):
  options = dict(
    train=dict(split='validation', size=200),
    test=dict(split='test', size=40),
    features='pixels',
    epsilon=0.1,
    delta=None,
    clip_norm=1.0,
    expected_batch_size=50,
    steps=4,
    learning_rate=1.0,
    batch_size=64,
  )
  return private_probe.evaluate(subject, **options | changes)


def test_the_guarantee_is_that_of_what_was_done(subject, monkeypatch):
  seen = []
  fit = private_probe.fit
  monkeypatch.setattr(
    private_probe,
    'fit',
    lambda plan, keys, *rest: seen.append((plan, keys)) or fit(plan, keys, *rest),
  )
  results = [_evaluate(subject) for _ in range(2)]
  (plan, keys), (_, other_keys) = seen
  assert keys != other_keys  # fresh from entropy
  assert (results[0].details['features'], results[0].details['layers']) == ('pixels', None)
  said = results[0].details['privacy']
  assert said['dataset_size'] == plan.dataset_size == 200 and plan.delta == 1 / 200
  assert said['epsilon']['pld'] == plan.epsilon(4) <= 0.1
  assert said['epsilon']['pld'] > 0.096  # and no more noise than that takes
  assert said['noise_multiplier'] == plan.noise_multiplier > 0
  assert '4 noisy gradients' in said['text']
  assert results[0].n == 40 and 'n_train' not in results[0].details


def test_groups_are_the_unit_of_the_probe_too(subject, tmp_path):
  groups = groups_lib.write(str(tmp_path / 'all.json'), np.arange(200), 'all')

  def make_source(section):
    source = subject.make_source(section)
    object.__setattr__(source, 'groups', groups if section['split'] == 'validation' else None)
    return source

  said = _evaluate(subject._replace(make_source=make_source)).details['privacy']
  assert said['unit'] == 'one group of near-duplicate labelled images'
  assert groups.not_covered in said['not_covered']


def test_impossible_plans_are_refused(subject):
  with pytest.raises(UserError, match='private_probe: .*expected_batch_size'):
    _evaluate(subject, expected_batch_size=201)
