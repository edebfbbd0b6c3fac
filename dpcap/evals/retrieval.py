"""Retrieval: are the most similar images of the same class?"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.errors import UserError
from dpcap.evals import features as features_lib
from dpcap.evals.evaluator import CHOICE, SOURCES, Evaluator, at_a_time
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.knn import unit
from dpcap.evals.progress import track
from dpcap.evals.subject import Result, Subject
from dpcap.key import COUNTS, Key

_AT_ONCE = 256  # queries
_SHOWN, _NEIGHBOURS = 12, 8  # queries whose nearest images are listed, and how many of these


def evaluate(
  subject: Subject,
  *,
  source,
  features: str,
  layers: str | None = None,
  at: Sequence[int],
  batch_size: int,
) -> Result:
  """Each image looks for its like among all others of the source, by cosine similarity.

  Args:
    subject: the model.
    source: labelled images.
    features: one of `features.FEATURES`.
    layers: of the model, see `features.choose`.
    at: numbers of neighbours.
    batch_size: images at a time while features are extracted.

  Returns:
    `value` is recall at the first of `at`: the share of images that have one of their class among so
    many nearest. The details have the recall at each, and the mean average precision
    (`mean_average_precision`, its interval by the normal approximation); `examples` list the
    nearest images of some. Images alone in their class are in the gallery and ask nothing.

  Raises:
    UserError: if the source has no labels, or no two images of a class.
  """
  choice = features_lib.choose('retrieval', subject.model, features, layers)
  records = subject.make_source(source)
  if not records.class_names:
    raise UserError('retrieval: the source has no labels; give it a label_key')
  part = features_lib.extract(subject, records, choice, batch_size)
  counts = np.bincount(part.labels, minlength=len(records.class_names))
  queries = np.flatnonzero(counts[part.labels] > 1)
  if not len(queries):
    raise UserError('retrieval: no two usable images of the source have the same class')
  first, precision, nearest = search(part.features, part.labels, queries)
  n = len(queries)
  recall = {str(k): float(np.mean(first < k)) for k in at}
  error = 1.959964 * float(precision.std(ddof=1)) / np.sqrt(n)
  mean = float(precision.mean())
  # As often as its class is asked for, a random other image is of it.
  share = (counts[part.labels[queries]] - 1) / (len(part.labels) - 1)
  chance = float(np.mean(1 - (1 - share) ** at[0]))
  number = lambda places: part.numbers[places].tolist()
  return Result(
    f'recall_at_{at[0]}',
    recall[str(at[0])],
    n,
    {
      'interval95': wilson_interval(recall[str(at[0])], n),
      'chance': chance,
      **choice._asdict(),
      'recall': {k: {'value': v, 'interval95': wilson_interval(v, n)} for k, v in recall.items()},
      'mean_average_precision': mean,
      'mean_average_precision_interval95': (mean - error, mean + error),
      'gallery': len(part.labels),
      'examples': [
        {
          'query': number(q),
          'nearest': number(row),
          'same_class': (part.labels[row] == part.labels[q]).tolist(),
        }
        for q, row in zip(queries[:_SHOWN], nearest)
      ],
    },
  )


def search(
  x: np.ndarray, labels: np.ndarray, queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Ranks all other images for each query.

  Args:
    x: (n, d) features.
    labels: (n,).
    queries: (q,) places in x; each has another one of its class.

  Returns:
    The rank of the first one of the same class (q,), from 0; the average precision (q,); the
    nearest ones (q, up to 8).
  """
  x, y = jnp.asarray(unit(x)), jnp.asarray(labels)
  kept = min(_NEIGHBOURS, len(x) - 1)

  # The images may be private: as constants they would be compiled into the program.
  @jax.jit
  def rank(x, y, queries):
    similarity = x[queries] @ x.T
    similarity = similarity.at[jnp.arange(len(queries)), queries].set(-jnp.inf)  # comes last
    order = jnp.argsort(-similarity, axis=1)[:, :-1]
    same = y[order] == y[queries][:, None]
    places = jnp.arange(1, same.shape[1] + 1)
    precision = jnp.cumsum(same, axis=1) / places
    average = jnp.sum(precision, axis=1, where=same) / jnp.sum(same, axis=1)
    return jnp.argmax(same, axis=1), average, order[:, :kept]

  starts = range(0, len(queries), _AT_ONCE)
  parts = [
    jax.device_get(rank(x, y, queries[i : i + _AT_ONCE]))
    for i in track('retrieval', starts, len(starts))
  ]
  return tuple(map(np.concatenate, zip(*parts)))


EVALUATOR = Evaluator(
  evaluate,
  {
    'source': SOURCES,
    **CHOICE,
    'at': Key(tuple, (1, 5, 10), 'numbers of neighbours', check=COUNTS),
    'batch_size': at_a_time(256),
  },
)
