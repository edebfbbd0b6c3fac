"""Few-shot probe: logistic regression on k images per class, for several fixed draws of them.

The protocol of the paper (Sander et al. 2024, appendix; that of Assran et al. 2022): the
features of an image lose their own mean and get norm 1, there is no intercept, and the objective
is mean cross-entropy + 0.0025 / n * |w|^2 / 2 for n training images.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from scipy import special

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.evals import features as features_lib
from dpcap.evals import logistic
from dpcap.evals.evaluator import CHOICE, PAIR, Evaluator, at_a_time
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.progress import track
from dpcap.evals.subject import Result, Subject
from dpcap.key import COUNTS, POSITIVE, Key

_L2 = 0.0025
_ITERATIONS = 300
_TOLERANCE = 1e-5  # on the gradient's norm


def evaluate(
  subject: Subject,
  *,
  train,
  test,
  features: str,
  layers: str | None = None,
  shots: Sequence[int],
  draws: int,
  batch_size: int,
) -> Result:
  """Top-1 accuracy by number of shots; `value` is that of the last number.

  Args:
    subject: the model.
    train: labelled images to draw from; draws are the same for every model.
    test: what is judged on, with the same classes.
    features: one of `features.FEATURES`.
    layers: of the model, see `features.choose`.
    shots: images per class. A draw of fewer is a part of the draw of more.
    draws: how many times.
    batch_size: images at a time while features are extracted.

  Returns:
    `interval95` is that of the mean over draws (Student's t), for these test images; with a
    single draw that of the share (Wilson). `shots` in the details lists them by number.

  Raises:
    UserError: if the sources do not belong together, or a class has too few images.
  """
  choice = features_lib.choose('few_shot', subject.model, features, layers)
  source, test_source = features_lib.make_pair(subject, 'few_shot', train, test)
  judged = features_lib.extract(subject, test_source, choice, batch_size)
  x_test, classes = jnp.asarray(normalise(judged.features)), source.class_names
  found = {k: [] for k in shots}
  for draw in track('few-shot probes', range(draws), draws, 'draws'):
    chosen = draw_shots(subject, source, max(shots), draw)
    part = features_lib.extract(
      subject, _Subset(source, tuple(chosen.ravel().tolist())), choice, batch_size
    )
    features_lib.checked_pair('few_shot', part, judged, classes)
    x = normalise(part.features).reshape(*chosen.shape, -1)
    for k in shots:
      weights = fit(x[:, :k].reshape(len(classes) * k, -1), np.repeat(np.arange(len(classes)), k))
      predicted = np.asarray(logistic.predict(weights, x_test))
      found[k].append(float(np.mean(predicted == judged.labels)))
  n = len(judged.labels)
  by_shots = {
    str(k): {'value': float(np.mean(values)), 'interval95': _interval(values, n), 'draws': values}
    for k, values in found.items()
  }
  last = by_shots[str(shots[-1])]
  return Result(
    'top1',
    last['value'],
    n,
    {
      'interval95': last['interval95'],
      'chance': 1 / len(classes),
      **choice._asdict(),
      'shots': by_shots,
      'classes': list(classes),
    },
  )


def draw_shots(subject: Subject, source: data.Source, k: int, draw: int) -> np.ndarray:
  """Numbers (classes, k) of usable images, those of draw `draw`.

  Images are looked at in a random order until every class has k of them.

  Raises:
    UserError: if a class has fewer.
  """
  chosen = [[] for _ in source.class_names]
  missing = len(chosen)
  for number in np.random.default_rng(draw).permutation(len(source)).tolist():
    if not missing:
      break
    try:
      record = source[number]
      label = record['label']
      if label < 0 or len(chosen[label]) == k:
        continue
      subject.transform.view(record['image'])
    except BadRecord:
      continue
    chosen[label].append(number)
    missing -= len(chosen[label]) == k
  for name, numbers in zip(source.class_names, chosen):
    if len(numbers) < k:
      raise UserError(
        f'few_shot: {k} shots are asked for, but class {name} of the train source has'
        f' {len(numbers)} usable images'
      )
  return np.array(chosen)


def normalise(x: np.ndarray) -> np.ndarray:
  """Features (n, d), each row without its mean and of norm 1."""
  x = x - x.mean(axis=1, keepdims=True)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def fit(x: np.ndarray, y: np.ndarray) -> logistic.Weights:
  """The weights for normalised features (n, d) and labels (n,), of which every class has some."""
  weights = logistic.zeros(x.shape[1], int(y.max()) + 1, intercept=False)
  x, y, l2 = jnp.asarray(x), jnp.asarray(y), _L2 / len(y)
  return logistic.minimise(weights, x, y, l2, _ITERATIONS, _TOLERANCE)


def _interval(values: Sequence[float], n: int) -> tuple[float, float]:
  if len(values) == 1:
    return wilson_interval(values[0], n)
  mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
  half = float(special.stdtrit(len(values) - 1, 0.975) * error)
  return max(0.0, float(mean) - half), min(1.0, float(mean) + half)


@dataclasses.dataclass(frozen=True)
class _Subset:
  """Some records of a source, as a source."""

  source: data.Source
  numbers: tuple[int, ...]

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.source.class_names

  @property
  def fingerprint(self) -> str:
    chosen = hashlib.sha256(repr(self.numbers).encode()).hexdigest()
    return f'{chosen} of {self.source.fingerprint}'

  @property
  def contents(self) -> data.Contents:
    return self.source.contents  # whose labels were looked at, all of them

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int):
    return self.source[self.numbers[index]]


EVALUATOR = Evaluator(
  evaluate,
  {
    **PAIR,
    **CHOICE,
    'shots': Key(tuple, (1, 2, 5, 10), 'images per class', check=COUNTS),
    'draws': Key(int, 5, 'how many times the images are drawn', check=POSITIVE),
    'batch_size': at_a_time(256),
  },
)
