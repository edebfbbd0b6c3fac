"""Linear probe: full-batch logistic regression on frozen features.

Features are standardised by the training set. The L2 strength is chosen on a fifth of
the training set that is held out, then the probe is fitted to all of it; the test set is
looked at once.
"""

import functools

import jax.numpy as jnp
import numpy as np

from dpcap.evals import features as features_lib
from dpcap.evals import logistic
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import CHOICE, PAIR, Evaluator, at_a_time
from dpcap.evals.subject import Result, Subject

L2_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 0.2
_ITERATIONS = 100
_TOLERANCE = 1e-4  # on the gradient's norm


def evaluate(
  subject: Subject, *, train, test, features: str, layers: str | None = None, batch_size: int
) -> Result:
  """Top-1 accuracy of a linear probe, with its 95% interval.

  Args:
    subject: the model.
    train, test: source sections of the config, with the same classes.
    features: one of `features.FEATURES`.
    layers: of the model, see `features.choose`.
    batch_size: images at a time while features are extracted.

  Raises:
    UserError: if the sources do not belong together, see `features.make_pair`.
  """
  choice = features_lib.choose('linear_probe', subject.model, features, layers)
  pair = features_lib.extract_pair(subject, 'linear_probe', train, test, choice, batch_size)
  probe, l2 = fit(pair.train.features, pair.train.labels, len(pair.classes))
  return top1(
    probe(pair.test.features),
    pair.test.labels,
    pair.classes,
    **choice._asdict(),
    dimension=pair.train.features.shape[1],
    n_train=len(pair.train.labels),
    l2=l2,
  )


def fit(x_train: np.ndarray, y_train: np.ndarray, num_classes: int, seed: int = 0):
  """Fits the probe.

  Args:
    x_train: (n, d) features.
    y_train: (n,) labels below num_classes.
    num_classes: number of classes.
    seed: of the split into fitting and held-out parts.

  Returns:
    A function (m, d) -> (m,) predicted labels, and the L2 strength it was fitted with.
  """
  mean, deviation = x_train.mean(0), x_train.std(0)
  deviation = np.where(deviation > 1e-6 * max(deviation.max(), 1e-30), deviation, 1.0)
  standardise = lambda x: jnp.asarray((x - mean) / deviation)
  x, y = standardise(x_train), jnp.asarray(y_train)
  order = np.random.default_rng(seed).permutation(len(y_train))
  held = max(1, int(_HELD_OUT * len(order)))
  held_out, kept = order[:held], order[held:]

  # From much to little regularisation, each fit starting from the one before.
  minimise = functools.partial(logistic.minimise, iterations=_ITERATIONS, tolerance=_TOLERANCE)
  zeros = logistic.zeros(x.shape[1], num_classes, intercept=True)
  weights, best, best_accuracy = zeros, L2_GRID[-1], -1.0
  for l2 in reversed(L2_GRID):
    if not len(kept):
      break
    weights = minimise(weights, x[kept], y[kept], l2)
    accuracy = float(jnp.mean(logistic.predict(weights, x[held_out]) == y[held_out]))
    if accuracy > best_accuracy:
      best, best_accuracy = l2, accuracy
  weights = minimise(zeros, x, y, best)
  return lambda new: np.asarray(logistic.predict(weights, standardise(new))), best


EVALUATOR = Evaluator(
  evaluate,
  {
    **PAIR,
    **CHOICE,
    'batch_size': at_a_time(256),
  },
)
