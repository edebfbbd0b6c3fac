"""Epochs of augmented images, for evaluations that train on images."""

import dataclasses
import math

import numpy as np

from dpcap.data.examples import Transform
from dpcap.data.pipeline import LabelledImages
from dpcap.data.source import BadRecord, Source


@dataclasses.dataclass(frozen=True)
class AugmentedBatches:
  """Random access to the parts of all batches of all epochs, in order (for `data.iterate`).

  Every epoch shuffles the numbers anew and drops what does not fill a batch. A batch comes in `parts`
  elements, for it may be larger than memory. An image that cannot be used has label -1.

  Attributes:
    source: labelled images.
    transform: with crops and flips.
    numbers: of the images to train on.
    batch_size: at most as many as there are numbers.
    at_once: images of an element.
    epochs: passes over the numbers.
    seed: of order and crops; public, for the images are.
  """

  source: Source
  transform: Transform
  numbers: tuple[int, ...]
  batch_size: int
  at_once: int
  epochs: int
  seed: int = 0

  @property
  def per_epoch(self) -> int:
    """Batches of an epoch."""
    return len(self.numbers) // self.batch_size

  @property
  def parts(self) -> int:
    """Elements of a batch."""
    return math.ceil(self.batch_size / self.at_once)

  def __len__(self) -> int:
    return self.epochs * self.per_epoch * self.parts

  def __getitem__(self, element: int) -> LabelledImages:
    batch, part = divmod(int(element), self.parts)
    epoch, batch = divmod(batch, self.per_epoch)
    order = np.random.default_rng((self.seed, epoch)).permutation(self.numbers)
    of_batch = order[batch * self.batch_size : (batch + 1) * self.batch_size]
    numbers = of_batch[part * self.at_once : (part + 1) * self.at_once]
    size = self.transform.image_size
    images = np.zeros((len(numbers), size, size, 3), np.uint8)
    labels = np.full(len(numbers), -1)
    for i, number in enumerate(numbers.tolist()):
      rng = np.random.default_rng((self.seed, epoch, number))
      try:
        record = self.source[number]
        images[i], labels[i] = self.transform.view(record['image'], rng), record['label']
      except BadRecord:
        continue
    return LabelledImages(images, labels, numbers)
