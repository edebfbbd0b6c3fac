"""Nearest class mean: is an image most like the average image of its class? And a map of these.

Nothing is trained. The mean features of the classes, on the two axes along which they differ
most, show which classes the features hold alike.
"""

from typing import Any

import numpy as np

from dpcap.errors import UserError
from dpcap.evals import features as features_lib
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import CHOICE, SOURCES, Evaluator, at_a_time
from dpcap.evals.knn import unit
from dpcap.evals.subject import Result, Subject


def evaluate(
  subject: Subject, *, source, features: str, layers: str | None = None, batch_size: int
) -> Result:
  """Top-1 accuracy of the class whose mean is nearest to an image, which has no part in the mean.

  Features are centred, over all images, and of norm 1 each; distances are Euclidean.

  Args:
    subject: the model.
    source: labelled images.
    features: one of `features.FEATURES`.
    layers: of the model, see `features.choose`.
    batch_size: images at a time while features are extracted.

  Returns:
    Images alone in their class are asked nothing. The details have the `map`: for each class with
    an image its `name`, its place `x`, `y` by principal components of the class means, the `count`
    of its images, and the `image` nearest to its mean, as number in the source; and the
    `variance_explained` by each axis, as shares of the variance between class means.

  Raises:
    UserError: if the source has no labels, fewer than two classes with images, or no two images of
      a class.
  """
  choice = features_lib.choose('nearest_class_mean', subject.model, features, layers)
  records = subject.make_source(source)
  names = records.class_names
  if not names:
    raise UserError('nearest_class_mean: the source has no labels; give it a label_key')
  part = features_lib.extract(subject, records, choice, batch_size)
  counts = np.bincount(part.labels, minlength=len(names))
  if np.count_nonzero(counts) < 2 or counts.max() < 2:
    raise UserError(
      'nearest_class_mean: the source has usable images of'
      f' {np.count_nonzero(counts)} of {len(names)} classes, at most {counts.max()} of one;'
      ' it takes two classes, and two images of one'
    )
  x_NxD = unit(part.features - part.features.mean(axis=0))
  means_CxD = class_means(x_NxD, part.labels, len(names))
  distances_NxC = squared_distances(x_NxD, part.labels, means_CxD, counts)
  queries = np.flatnonzero(counts[part.labels] > 1)
  predicted = distances_NxC.argmin(axis=1)
  return top1(
    predicted[queries],
    part.labels[queries],
    names,
    **choice._asdict(),
    **draw_map(x_NxD, part.labels, means_CxD, counts, names, part.numbers),
  )


def class_means(x_NxD: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
  """Mean features (C, D) of the classes; zero where there is no image."""
  sums_CxD = np.zeros((classes, x_NxD.shape[1]))
  np.add.at(sums_CxD, labels, x_NxD)
  return sums_CxD / np.maximum(np.bincount(labels, minlength=classes), 1)[:, None]


def squared_distances(
  x_NxD: np.ndarray, labels: np.ndarray, means_CxD: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """From each image to each class mean (N, C), to that of its own class without it.

  Infinite where a class has no image, or none but that one.
  """
  norms_Nx1 = np.sum(x_NxD**2, axis=1, keepdims=True)
  squared_NxC = norms_Nx1 - 2 * x_NxD @ means_CxD.T + np.sum(means_CxD**2, axis=1)
  squared_NxC[:, counts == 0] = np.inf
  # Without itself, an image is n / (n - 1) times as far from the mean of the n.
  rows, n = np.arange(len(labels)), counts[labels]
  farther = n / np.maximum(n - 1, 1)
  squared_NxC[rows, labels] = np.where(n > 1, squared_NxC[rows, labels] * farther**2, np.inf)
  return squared_NxC


def draw_map(
  x_NxD: np.ndarray,
  labels: np.ndarray,
  means_CxD: np.ndarray,
  counts: np.ndarray,
  names: tuple[str, ...],
  numbers: np.ndarray,
) -> dict[str, Any]:
  """`map` and `variance_explained`, see `evaluate`."""
  there = np.flatnonzero(counts)
  places_Cx2, shares = principal_components(means_CxD[there])
  classes = []
  for label, (x, y) in zip(there, places_Cx2.tolist()):
    of_class = np.flatnonzero(labels == label)
    apart = np.sum((x_NxD[of_class] - means_CxD[label]) ** 2, axis=1)
    image = int(numbers[of_class[apart.argmin()]])
    count = int(counts[label])
    classes.append({'name': names[label], 'x': x, 'y': y, 'count': count, 'image': image})
  return {'map': classes, 'variance_explained': shares}


def principal_components(points_CxD: np.ndarray) -> tuple[np.ndarray, list[float]]:
  """Places (C, 2) on the two axes of largest variance, and their shares of it.

  The signs of the axes are such that the point farthest out on each is on its positive side. All is
  NaN if a point is: a diverged model has such.
  """
  if not np.isfinite(points_CxD).all():
    return np.full((len(points_CxD), 2), np.nan), [np.nan, np.nan]
  centred = points_CxD - points_CxD.mean(axis=0)
  u, s, _ = np.linalg.svd(centred, full_matrices=False)
  places = np.zeros((len(centred), 2))
  axes = min(2, len(s))
  places[:, :axes] = u[:, :axes] * s[:axes]
  farthest = np.abs(places).argmax(axis=0)
  signs = np.where(places[farthest, [0, 1]] < 0, -1, 1)
  shares = np.zeros(2)
  shares[:axes] = s[:axes] ** 2 / max(np.sum(s**2), np.finfo(float).tiny)
  return places * signs, shares.tolist()


EVALUATOR = Evaluator(
  evaluate,
  {'source': SOURCES, **CHOICE, 'batch_size': at_a_time(256)},
)
