"""Features of labelled images: the model's, an untrained model's, or raw pixels."""

import jax
import numpy as np

from dpcap import data
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

  @jax.jit
  def embed(images):
    if kind == 'pixels':
      return data.normalize(images).reshape(len(images), -1)
    return subject.model.apply(variables, data.normalize(images), method='features')

  features, labels = [], []
  batches = data.EvaluationBatches(source, subject.transform, batch_size)
  for batch in data.iterate(batches, 0, subject.workers):
    n = len(batch.labels)
    # One shape for all batches: the last one is filled up, and cut again.
    images = np.zeros((batch_size, *batch.images.shape[1:]), np.uint8)
    images[:n] = batch.images
    keep = batch.labels >= 0
    features.append(np.asarray(embed(images)[:n], np.float32)[keep])
    labels.append(batch.labels[keep])
  return np.concatenate(features), np.concatenate(labels)
