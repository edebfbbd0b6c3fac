"""Nearest neighbours against loops over all images."""

import numpy as np
import pytest

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import knn, retrieval


@pytest.fixture(name='rng')
def _rng():
  return np.random.default_rng()


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))


def test_votes_are_weighted_by_similarity(rng, monkeypatch):
  monkeypatch.setattr(knn, '_AT_ONCE', 16)
  x_train, y_train = rng.normal(size=(50, 6)).astype(np.float32), rng.integers(0, 4, 50)
  x_test = rng.normal(size=(40, 6)).astype(np.float32)
  expected = []
  for x in x_test:
    similar = sorted(((cosine(x, t), y) for t, y in zip(x_train, y_train)), reverse=True)[:7]
    votes = np.zeros(4)
    for s, y in similar:
      votes[y] += np.exp(s / 0.07)
    expected.append(votes.argmax())
  np.testing.assert_array_equal(knn.classify(x_train, y_train, x_test, 4, 7), expected)


def test_knn_tells_what_it_measured(subject):
  train, test = dict(split='validation', size=90), dict(split='test', size=40)
  options = dict(train=train, test=test, features='model', layers='encoder', batch_size=32)
  result = knn.evaluate(subject, k=5, **options)
  assert (result.metric, result.n, result.details['n_train']) == ('top1', 40, 90)
  assert (result.details['features'], result.details['layers']) == ('model', 'encoder')
  assert result.details['chance'] == 1 / 8 and sum(map(sum, result.details['confusion'])) == 40
  with pytest.raises(UserError, match='knn: k is 91, but there are 90 training images'):
    knn.evaluate(subject, k=91, **options)


def test_ranking_against_a_loop(rng, monkeypatch):
  monkeypatch.setattr(retrieval, '_AT_ONCE', 16)
  x, labels = rng.normal(size=(30, 5)).astype(np.float32), rng.integers(0, 4, 30)
  labels[3] = 9  # alone
  queries = np.flatnonzero(labels != 9)
  first, precision, nearest = retrieval.search(x, labels, queries)
  for q, found_first, found_precision, found_nearest in zip(queries, first, precision, nearest):
    others = [i for i in range(30) if i != q]
    ranked = sorted(others, key=lambda i: -cosine(x[q], x[i]))
    same = [labels[i] == labels[q] for i in ranked]
    assert found_first == same.index(True)
    at = [sum(same[: i + 1]) / (i + 1) for i in range(29) if same[i]]
    assert found_precision == pytest.approx(np.mean(at), rel=1e-5)
    assert found_nearest.tolist() == ranked[:8]


def test_retrieval_tells_what_it_measured(subject):
  source = dict(split='test', size=40)
  result = retrieval.evaluate(subject, source=source, features='pixels', at=(1, 5), batch_size=32)
  assert result.metric == 'recall_at_1' and result.n <= 40
  assert (result.details['features'], result.details['layers']) == ('pixels', None)
  recall = result.details['recall']
  assert result.value == recall['1']['value'] <= recall['5']['value']
  low, high = result.details['mean_average_precision_interval95']
  assert low <= result.details['mean_average_precision'] <= high
  assert 0 < result.details['chance'] < 0.3
  scenes = data.Scenes(image_size=16, **source)
  for example in result.details['examples']:
    label = lambda number: scenes[number]['label']
    of_class = [label(number) == label(example['query']) for number in example['nearest']]
    assert example['same_class'] == of_class


def test_retrieval_among_strangers_is_refused(subject):
  with pytest.raises(UserError, match='retrieval: no two usable images'):
    retrieval.evaluate(
      subject, source=dict(split='test', size=1), features='pixels', at=(1,), batch_size=8
    )
