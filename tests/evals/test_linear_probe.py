"""The probe against a direct solution, on problems whose answer is known."""

import types

import numpy as np
import pytest

from dpcap import data
from dpcap.data.source import BadRecord, Record
from dpcap.data.text import BytesTokenizer
from dpcap.errors import UserError
from dpcap.evals import linear_probe, logistic
from dpcap.evals.subject import Subject


def _blobs(rng, n, spread):
  labels = rng.integers(0, 3, n)
  centres = np.array([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]])
  return (centres[labels] + spread * rng.normal(size=(n, 4))).astype(np.float32), labels


def test_separable_classes_are_told_apart_whatever_the_scale_of_the_features():
  rng = np.random.default_rng()
  x, y = _blobs(rng, 300, 0.3)
  x_test, y_test = _blobs(rng, 300, 0.3)
  scale = np.array([1e-4, 1, 1e4, 1], np.float32)
  probe, l2 = linear_probe.fit(x * scale + 7, y, 3)
  assert l2 in linear_probe.L2_GRID
  assert np.mean(probe(x_test * scale + 7) == y_test) > 0.98


def test_noise_gives_chance():
  rng = np.random.default_rng()
  probe, _ = linear_probe.fit(
    rng.normal(size=(600, 20)).astype(np.float32), rng.integers(0, 4, 600), 4
  )
  accuracy = np.mean(
    probe(rng.normal(size=(2000, 20)).astype(np.float32)) == rng.integers(0, 4, 2000)
  )
  assert 0.17 < accuracy < 0.33


def test_solution_is_the_minimum_of_the_convex_objective():
  """The gradient, by hand in float64, vanishes."""
  rng = np.random.default_rng()
  x, y = _blobs(rng, 200, 2.0)
  l2 = 1e-2
  weights = logistic.minimise(logistic.zeros(4, 3, intercept=True), x, y, l2, 100, 1e-4)
  w, b = np.float64(weights['w']), np.float64(weights['b'])
  logits = x @ w + b
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  error = (p - np.eye(3)[y]) / len(y)
  assert np.abs(x.T @ error + l2 * w).max() < 3e-4 and np.abs(error.sum(0)).max() < 3e-4


def test_constant_features_do_no_harm():
  rng = np.random.default_rng()
  x, y = _blobs(rng, 200, 0.3)
  x = np.concatenate([x, np.full((200, 3), 5, np.float32)], 1)
  probe, _ = linear_probe.fit(x, y, 3)
  assert np.mean(probe(x) == y) > 0.98


class _Colours:
  """Images whose mean brightness is their label; every seventh record is bad."""

  def __init__(self, n, class_names=('dark', 'light')):
    self._n, self.class_names = n, class_names

  def __len__(self):
    return self._n

  def __getitem__(self, i):
    if i % 7 == 3:
      raise BadRecord('bad')
    label = (i * 7919) % 5 % 2
    noise = np.random.default_rng(i).integers(0, 60, (4, 4, 3), dtype=np.uint8)
    return Record(image=noise + np.uint8(120 * label), caption='x', label=label)


def _subject(sources):
  return Subject(
    model=types.SimpleNamespace(apply=None),
    variables={},
    untrained={},
    transform=data.Transform(4, 8, BytesTokenizer()),
    make_source=lambda name: sources[name],
    note=lambda source: None,
    workers=0,
  )


def test_evaluate_counts_usable_images_and_gives_an_interval():
  subject = _subject({'a': _Colours(140), 'b': _Colours(70)})
  result = linear_probe.evaluate(subject, train='a', test='b', features='pixels', batch_size=32)
  assert (result.metric, result.n, result.details['n_train']) == ('top1', 60, 120)
  assert (result.details['features'], result.details['layers']) == ('pixels', None)
  assert result.value > 0.95
  low, high = result.details['interval95']
  assert low <= result.value <= high
  assert set(result.details['per_class']) == {'dark', 'light'}


def test_sources_without_labels_or_with_other_classes_are_refused():
  sources = {'a': _Colours(20), 'none': _Colours(20, ()), 'other': _Colours(20, ('dark', 'red'))}
  for train, test, said in (
    ('a', 'none', 'test source has no labels'),
    ('a', 'other', 'light, red'),
  ):
    with pytest.raises(UserError, match=said):
      linear_probe.evaluate(
        _subject(sources), train=train, test=test, features='pixels', batch_size=8
      )
