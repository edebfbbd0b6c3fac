"""The probe of MAE's protocol: its step by hand, its views, and what it chooses by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import data
from dpcap.evals import linear_probe_sgd

TRAIN, TEST = dict(split='validation', size=70), dict(split='test', size=30)


@pytest.mark.parametrize('optimizer', linear_probe_sgd.OPTIMIZERS)
def test_steps_by_hand(optimizer):
  """Batch norm, gradient, trust ratio, momentum and running statistics in float64."""
  rng = np.random.default_rng()
  schedule, scale = (lambda step: 0.5**step), jnp.array([0.3, 2.0])
  heads = linear_probe_sgd.start_heads(4, 3, scale, optimizer, schedule)
  step = linear_probe_sgd.make_step(optimizer, schedule)
  mean, variance = np.zeros(4), np.ones(4)
  weights = [{'w': np.float64(heads.weights['w'][h]), 'b': np.zeros(3)} for h in range(2)]
  traces = [{'w': np.zeros((4, 3)), 'b': np.zeros(3)} for _ in range(2)]
  for i in range(2):
    x = rng.normal(2, 3, size=(6, 4)).astype(np.float32)
    y = np.array([0, 1, 2, 0, 1, -1])
    heads = step(heads, scale, x, y)
    used, labels = np.float64(x[:5]), y[:5]  # the last one cannot be used
    normed = (used - used.mean(0)) / np.sqrt(used.var(0) + 1e-6)
    mean = 0.9 * mean + 0.1 * used.mean(0)
    variance = 0.9 * variance + 0.1 * used.var(0, ddof=1)
    for weight, trace, rate in zip(weights, traces, (0.3, 2.0)):
      scores = np.exp(normed @ weight['w'] + weight['b'])
      d = (scores / scores.sum(1, keepdims=True) - np.eye(3)[labels]) / 5
      for key, gradient in (('w', normed.T @ d), ('b', d.sum(0))):
        if optimizer == 'lars' and key == 'w':
          norms = np.linalg.norm(weight['w']), np.linalg.norm(gradient)
          gradient = gradient * 0.001 * norms[0] / norms[1]
        trace[key] = 0.9 * trace[key] + rate * 0.5**i * gradient
        if optimizer == 'sgd':  # which has the rate outside of the momentum
          trace[key] += (1 - rate * 0.5**i) * gradient
        weight[key] = weight[key] - (rate * 0.5**i if optimizer == 'sgd' else 1) * trace[key]
  np.testing.assert_allclose(heads.mean, mean, rtol=1e-5)
  np.testing.assert_allclose(heads.variance, variance, rtol=1e-5)
  for h in range(2):
    np.testing.assert_allclose(heads.weights['w'][h], weights[h]['w'], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(heads.weights['b'][h], weights[h]['b'], rtol=1e-4, atol=1e-6)


def test_the_rate_warms_up_and_falls_to_zero():
  scale, schedule = linear_probe_sgd._schedules([0.1, 0.2], 512, 5, epochs=10, warmup_epochs=2)
  np.testing.assert_allclose(scale, [0.2, 0.4])
  values = [float(schedule(step)) for step in (0, 5, 10, 30, 50)]
  np.testing.assert_allclose(values, [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_views_are_new_in_every_epoch_and_cover_the_images_once(subject):
  source = subject.make_source(TRAIN)
  transform = dataclasses.replace(subject.transform, crop_scale=(0.08, 1.0), flip=True)
  numbers = tuple(range(0, 40, 2))
  views = data.AugmentedBatches(source, transform, numbers, batch_size=9, at_once=4, epochs=2)
  assert views.per_epoch == 2 and views.parts == 3 and len(views) == 12
  elements = [views[i] for i in range(12)]
  assert [len(e.labels) for e in elements[:3]] == [4, 4, 1]
  epochs = [np.concatenate([e.numbers for e in part]) for part in (elements[:6], elements[6:])]
  for epoch in epochs:
    assert len(set(epoch)) == 18 and set(epoch) <= set(numbers)
  assert (epochs[0] != epochs[1]).any()
  images = [
    {n: image for e in part for n, image in zip(e.numbers, e.images)}
    for part in (elements[:6], elements[6:])
  ]
  both = images[0].keys() & images[1].keys()
  assert sum((images[0][n] != images[1][n]).any() for n in both) > len(both) / 2
  for e in elements:
    assert all(source[int(n)]['label'] == label for n, label in zip(e.numbers, e.labels))


def evaluate(subject, **changes):
  options = dict(
    train=TRAIN,
    test=TEST,
    optimizer='sgd',
    epochs=2,
    warmup_epochs=1,
    base_learning_rates=(0.1,),
    probe_batch_size=32,
    augment=False,
    batch_size=16,
  )
  return linear_probe_sgd.evaluate(subject, **options | changes)


@pytest.mark.parametrize('augment', [True, False])
def test_learns_what_can_be_told_apart(subject, augment, monkeypatch):
  """Features that are the label itself, whatever the view."""

  class Easy(data.Scenes):
    def __getitem__(self, index):
      record = super().__getitem__(index)
      record['image'][:] = 30 * record['label']
      return record

  monkeypatch.setattr(
    type(subject.model),
    'features',
    lambda self, x, layers: jax.nn.one_hot(jnp.round(x[..., 0, 0, 0]), 9) * (layers == 'encoder'),
  )
  monkeypatch.setattr(linear_probe_sgd.data, 'normalize', lambda images: images / 30.0)
  monkeypatch.setattr('dpcap.evals.features.data.normalize', lambda images: images / 30.0)
  easy = subject._replace(make_source=lambda section: Easy(image_size=16, **section))
  result = evaluate(
    easy, layers='encoder', augment=augment, epochs=6, base_learning_rates=(4.0,)
  )
  assert (result.details['features'], result.details['layers']) == ('model', 'encoder')
  assert result.value == 1.0 and result.n == 30


def test_the_rate_is_chosen_on_held_out_training_images(subject, monkeypatch):
  chosen = []
  train_heads = linear_probe_sgd.train_heads

  def noting(subject, source, pair, places, rates, *rest, **settings):
    chosen.append((len(places), list(rates)))
    return train_heads(subject, source, pair, places, rates, *rest, **settings)

  monkeypatch.setattr(linear_probe_sgd, 'train_heads', noting)
  result = evaluate(subject, base_learning_rates=(1e-6, 0.1))
  rate = result.details['base_learning_rate']
  assert chosen == [(56, [1e-6, 0.1]), (70, [rate])]
