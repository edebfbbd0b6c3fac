"""Few-shot probes: which images are drawn, and the objective that is minimised."""

import jax
import numpy as np
import pytest
from scipy import optimize

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import few_shot

TRAIN, TEST = dict(split='validation', size=150), dict(split='test', size=60)


def evaluate(subject, **changes):
  options = dict(train=TRAIN, test=TEST, features='pixels', shots=(1, 3), draws=2, batch_size=32)
  return few_shot.evaluate(subject, **options | changes)


def test_the_weights_minimise_the_papers_objective():
  rng = np.random.default_rng()
  x, y = few_shot.normalise(rng.normal(size=(12, 5))), np.arange(12) % 3
  x = x.astype(np.float32)
  l2 = 3.0  # the paper's 0.0025 leaves a flat valley; the same objective, steeper

  def objective(w):
    scores = x.astype(np.float64) @ w.reshape(5, 3)
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(12), y]
    return losses.mean() + l2 / len(y) * np.sum(w**2) / 2

  best = optimize.minimize(objective, np.zeros(15), tol=1e-12).x.reshape(5, 3)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(few_shot, '_L2', l2)
    found = few_shot.fit(x, y)
  assert found.keys() == {'w'}
  np.testing.assert_allclose(found['w'], best, atol=1e-3)


def test_features_are_centred_by_themselves_and_have_norm_one():
  x = np.random.default_rng().normal(3, 2, size=(4, 7))
  rows = few_shot.normalise(x)
  for row, raw in zip(rows, x):
    centred = raw - raw.mean()
    np.testing.assert_allclose(row, centred / np.sqrt(np.sum(centred**2)))


def test_draws_have_k_of_each_class_and_differ(subject):
  source = data.Scenes(image_size=16, **TRAIN)
  draws = [few_shot.draw_shots(subject, source, 3, draw) for draw in (0, 1)]
  for chosen in draws:
    assert chosen.shape == (8, 3)
    for label, numbers in enumerate(chosen):
      assert len(set(numbers)) == 3
      assert all(source[number]['label'] == label for number in numbers)
  assert (draws[0] != draws[1]).any()
  fewer = few_shot.draw_shots(subject, source, 2, 0)
  np.testing.assert_array_equal(fewer, draws[0][:, :2])


def test_accuracy_by_shots(subject):
  result = evaluate(subject)
  assert result.metric == 'top1' and result.n == 60 and result.details['chance'] == 1 / 8
  assert (result.details['features'], result.details['layers']) == ('pixels', None)
  shots = result.details['shots']
  assert list(shots) == ['1', '3']
  for entry in shots.values():
    low, high = entry['interval95']
    assert len(entry['draws']) == 2
    assert entry['value'] == pytest.approx(np.mean(entry['draws']))
    assert low <= entry['value'] <= high
  assert result.value == shots['3']['value'] and result.details['interval95'] is not None
  # One draw, by hand; the one with fewer shots is its beginning.
  source, judged = data.Scenes(image_size=16, **TRAIN), data.Scenes(image_size=16, **TEST)
  pixels = lambda s, numbers: np.array([data.normalize(s[i]['image']).ravel() for i in numbers])
  labels = np.array([judged[i]['label'] for i in range(60)])
  for k in (1, 3):
    chosen = few_shot.draw_shots(subject, source, 3, 1)[:, :k]
    x = few_shot.normalise(pixels(source, chosen.ravel()))
    weights = few_shot.fit(x, np.repeat(np.arange(8), k))
    scores = few_shot.normalise(pixels(judged, range(60))) @ jax.device_get(weights['w'])
    right = np.mean(scores.argmax(1) == labels)
    assert shots[str(k)]['draws'][1] == pytest.approx(right, abs=0.02)


def test_students_interval():
  low, high = few_shot._interval([0.5, 0.6, 0.7], 100)
  assert (low, high) == pytest.approx(
    (0.6 - 4.3027 * 0.1 / 3**0.5, 0.6 + 4.3027 * 0.1 / 3**0.5), 1e-4
  )


def test_too_few_images_of_a_class_are_refused(subject):
  with pytest.raises(UserError, match='few_shot: 40 shots are asked for, but class .* has'):
    evaluate(subject, shots=(40,))


def test_shots_are_records_of_their_source():
  """All of which were looked at for their labels."""
  source = data.Scenes(split='test', size=9, image_size=8)
  assert few_shot._Subset(source, (3, 5)).contents == source.contents
