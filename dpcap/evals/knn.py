"""k nearest neighbours: what the features are worth without any training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.errors import UserError
from dpcap.evals import features as features_lib
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import CHOICE, PAIR, Evaluator, at_a_time
from dpcap.evals.progress import track
from dpcap.evals.subject import Result, Subject
from dpcap.key import POSITIVE, Key

_AT_ONCE = 256  # test images; their similarities to all training images are held
_TEMPERATURE = 0.07


def evaluate(
  subject: Subject,
  *,
  train,
  test,
  features: str,
  layers: str | None = None,
  k: int,
  batch_size: int,
) -> Result:
  """Top-1 accuracy of a vote of the k most similar training images.

  Similarity is the cosine s; a neighbour's vote weighs exp(s / 0.07) (Wu et al. 2018, section 3.4).

  Args:
    subject: the model.
    train, test: source sections of the config, with the same classes.
    features: one of `features.FEATURES`.
    layers: of the model, see `features.choose`.
    k: how many vote.
    batch_size: images at a time while features are extracted.

  Raises:
    UserError: if the sources do not belong together, or there are fewer than k training images.
  """
  choice = features_lib.choose('knn', subject.model, features, layers)
  pair = features_lib.extract_pair(subject, 'knn', train, test, choice, batch_size)
  if k > len(pair.train.labels):
    raise UserError(f'knn: k is {k}, but there are {len(pair.train.labels)} training images')
  predicted = classify(
    pair.train.features, pair.train.labels, pair.test.features, len(pair.classes), k
  )
  return top1(
    predicted,
    pair.test.labels,
    pair.classes,
    **choice._asdict(),
    k=k,
    n_train=len(pair.train.labels),
  )


def classify(
  x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, num_classes: int, k: int
) -> np.ndarray:
  """Classes (m,) of features (m, d), voted by the nearest of (n, d)."""
  x_train, y_train = jnp.asarray(unit(x_train)), jnp.asarray(y_train)
  starts = range(0, len(x_test), _AT_ONCE)
  predicted = [
    np.asarray(_vote(x_train, y_train, unit(x_test[i : i + _AT_ONCE]), num_classes, k))
    for i in track('nearest neighbours', starts, len(starts))
  ]
  return np.concatenate(predicted)


def unit(x: np.ndarray) -> np.ndarray:
  """Rows (n, d) of norm 1."""
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


@functools.partial(jax.jit, static_argnames=('num_classes', 'k'))
def _vote(x_train, y_train, x_test, num_classes, k):
  similarity, nearest = jax.lax.top_k(x_test @ x_train.T, k)
  votes = jnp.exp((similarity - similarity[:, :1]) / _TEMPERATURE)
  add = lambda votes, labels: jnp.zeros(num_classes).at[labels].add(votes)
  return jnp.argmax(jax.vmap(add)(votes, y_train[nearest]), axis=-1)


EVALUATOR = Evaluator(
  evaluate,
  {
    **PAIR,
    **CHOICE,
    'k': Key(int, 20, 'how many neighbours vote', check=POSITIVE),
    'batch_size': at_a_time(256),
  },
)
