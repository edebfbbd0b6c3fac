"""Nearest class means against a loop that leaves each image out."""

import numpy as np
import pytest

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import nearest_class_mean as ncm


def test_distances_leave_each_image_out():
  rng = np.random.default_rng()
  x = rng.normal(size=(20, 3))
  labels = np.array([0] * 9 + [1] * 8 + [2, 2] + [4])  # none of class 3, one of class 4
  counts = np.bincount(labels, minlength=5)
  found = ncm.squared_distances(x, labels, ncm.class_means(x, labels, 5), counts)
  for i in range(20):
    for c in range(5):
      others = [x[j] for j in range(20) if j != i and labels[j] == c]
      expected = np.sum((x[i] - np.mean(others, axis=0)) ** 2) if others else np.inf
      assert found[i, c] == pytest.approx(expected), (i, c)


def test_places_keep_the_two_largest_variances():
  rng = np.random.default_rng()
  plane = np.linalg.qr(rng.normal(size=(7, 3)))[0].T
  x = rng.normal(size=(30, 3)) * (9, 3, 0.1)
  x -= x.mean(axis=0)
  places, shares = ncm.principal_components(x @ plane + 5)
  assert sum(shares) > 0.99 and shares[0] > shares[1]
  # Distances are kept: what is far in the space is far on the map.
  apart = lambda points: np.linalg.norm(points[:, None] - points[None], axis=-1)
  np.testing.assert_allclose(apart(places), apart(x[:, :2]), atol=1)
  assert all(places[np.abs(places).argmax(axis=0), [0, 1]] > 0)
  for other in (x @ plane, -x @ plane + 1):  # also of mirrored features
    np.testing.assert_allclose(
      np.abs(ncm.principal_components(other)[0]), np.abs(places), atol=1e-6
    )
  places, shares = ncm.principal_components(np.array([[1.0], [3.0]]))
  np.testing.assert_allclose(np.sort(places, axis=0), [[-1, 0], [1, 0]], atol=1e-12)
  assert shares == [1, 0]
  places, shares = ncm.principal_components(np.array([[1.0, np.nan], [3.0, 1.0]]))
  assert np.isnan(places).all() and np.isnan(shares).all()


def test_result_and_map(subject):
  section = dict(split='test', size=40)
  result = ncm.evaluate(subject, source=section, features='pixels', batch_size=16)
  scenes = data.Scenes(image_size=16, **section)
  labels = [scenes[i]['label'] for i in range(40)]
  counts = {name: labels.count(i) for i, name in enumerate(scenes.class_names) if i in labels}
  details = result.details
  assert result.n == sum(count for count in counts.values() if count > 1)
  assert {entry['name']: entry['count'] for entry in details['map']} == counts
  x = np.stack([data.normalize(scenes[i]['image']).reshape(-1) for i in range(40)])
  x -= x.mean(axis=0)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  of_class = lambda c, but=None: [i for i in range(40) if labels[i] == c and i != but]
  far = lambda i, members: np.sum((x[i] - x[members].mean(axis=0)) ** 2)
  right = []
  for i, label in enumerate(labels):
    if len(of_class(label)) > 1:
      distances = {c: far(i, of_class(c, i)) for c in set(labels)}
      right.append(min(distances, key=distances.get) == label)
  assert result.value == pytest.approx(np.mean(right))
  for entry in details['map']:
    members = of_class(scenes.class_names.index(entry['name']))
    assert entry['image'] == min(members, key=lambda i: far(i, members))
  low, high = details['interval95']
  assert low <= result.value <= high and details['chance'] == 1 / 8
  assert (details['features'], details['layers']) == ('pixels', None)
  assert 0 < details['variance_explained'][1] <= details['variance_explained'][0] < 1


def test_one_image_of_each_class_is_refused(subject):
  with pytest.raises(UserError, match='nearest_class_mean: the source has usable images of 1 of 8'):
    ncm.evaluate(subject, source=dict(split='test', size=1), features='pixels', batch_size=16)
