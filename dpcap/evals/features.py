"""Features of labelled images: the model's, an untrained model's, or raw pixels."""

import jax
import numpy as np

from dpcap import data
from dpcap.evals import batches as batches_lib
from dpcap.evals.subject import Subject

FEATURES = ('model', 'untrained', 'pixels')


def extract(
  subject: Subject, source: data.Source, kind: str, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Features and labels of all usable labelled images of a source.

  Args:
    subject: the model.
    source: labelled images.
    kind: one of FEATURES.
    batch_size: images at a time.

  Returns:
    (n, d) float32 and (n,) int64; n leaves out images that cannot be decoded and
    examples without a label.
  """
  variables = subject.untrained if kind == 'untrained' else subject.variables

  # Variables are arguments: as constants they would be compiled into the program.
  @jax.jit
  def embed(variables, images):
    if kind == 'pixels':
      return data.normalize(images).reshape(len(images), -1)
    return subject.model.apply(variables, data.normalize(images), method='features')

  def compute(batch):
    keep = np.flatnonzero(batch.labels >= 0)
    features = embed(variables, batches_lib.spread(batch.images, batch_size))
    return np.asarray(features, np.float32)[keep], batch.labels[keep]

  batches = data.EvaluationBatches(source, subject.transform, batch_size)
  answers = list(batches_lib.each(subject, f'features of {kind}', batches, compute))
  features, labels = zip(*answers)
  return np.concatenate(features), np.concatenate(labels)
