"""Top-1 accuracy as a result: its interval, the chance level, classes, confusions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpcap.evals.intervals import wilson_interval
from dpcap.evals.subject import Result

_MOST_CONFUSED = 100  # classes up to which the confusion matrix is written down


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
