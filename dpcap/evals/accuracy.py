"""Top-1 accuracy as a result: its interval, the chance level, classes, confusions.

And the accuracy of a classifier's own logits, the evaluator of that name.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals.evaluator import SOURCES, Evaluator, at_a_time
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.subject import Result, Subject

_MOST_CONFUSED = 100  # classes up to which the confusion matrix is written down
_TOP = 5


def evaluate(subject: Subject, *, source, batch_size: int) -> Result:
  """Top-1 accuracy of the model's own logits; of more than five classes, top-5 in the details.

  Args:
    subject: the model, a classifier.
    source: labelled images, a source section of the config.
    batch_size: images at a time.

  Raises:
    UserError: if the model has not the source's classes, or no image can be used.
  """
  model = subject.model
  records = subject.make_source(source)
  names = records.class_names
  if len(names) != model.classes:
    raise UserError(
      f'accuracy: the source has {len(names)} classes, the model {model.classes} (model.classes)'
    )
  top = min(_TOP, len(names))

  # Variables are arguments: as constants they would be compiled into the program.
  @jax.jit
  def rank(variables, images):
    logits = model.apply(variables, data.normalize(images), method='logits')
    return jax.lax.top_k(logits, top)[1]

  def compute(batch):
    ranked = rank(subject.variables, batches_lib.spread(batch.images, batch_size))
    return batch.labels, np.asarray(ranked)[: len(batch.labels)]

  batches = data.EvaluationBatches(records, subject.transform, batch_size)
  answers = batches_lib.each(subject, 'accuracy', batches, compute)
  labels, ranked = map(np.concatenate, zip(*answers))
  usable = labels >= 0
  labels, ranked = labels[usable], ranked[usable]
  if not len(labels):
    raise UserError('accuracy: the source has no usable labelled image')
  details = {'left_out': int(np.sum(~usable))}
  if len(names) > _TOP:
    among = float(np.mean(np.any(ranked == labels[:, None], axis=1)))
    details |= {'top5': among, 'top5_interval95': wilson_interval(among, len(labels))}
  return top1(ranked[:, 0], labels, names, **details)


def top1(
  predicted: np.ndarray, labels: np.ndarray, classes: Sequence[str], **details: Any
) -> Result:
  """The share of right answers.

  Args:
    predicted: (n,) classes, as numbers.
    labels: (n,) the right ones.
    classes: their names.
    details: what else is to be written down.
  """
  correct, n = predicted == labels, len(labels)
  value = float(np.mean(correct))
  details |= {
    'interval95': wilson_interval(value, n),
    'chance': 1 / len(classes),
    'classes': list(classes),
    'per_class': {
      name: float(np.mean(correct[labels == i]))
      for i, name in enumerate(classes)
      if np.any(labels == i)
    },
  }
  if len(classes) <= _MOST_CONFUSED:
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, predicted), 1)
    details['confusion'] = confusion.tolist()  # [label][predicted]
  return Result('top1', value, n, details)


EVALUATOR = Evaluator(
  evaluate,
  {
    'source': SOURCES,
    'batch_size': at_a_time(256),
  },
  needs='logits',
)
