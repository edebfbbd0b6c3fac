"""Images with captions of their own, in batches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpcap import data
from dpcap.data.source import BadRecord, Record, check_caption, read_each


class CaptionedImages(NamedTuple):
  """The usable ones of a batch: B images with C captions, one or more each.

  Attributes:
    images: uint8 (B, H, W, 3).
    numbers: int32 (B,), their places in the source.
    tokens: int32 (C, L), the captions, those of an image in the order that its record has.
    owners: int32 (C,), the place in the batch of the image that each belongs to, ascending.
  """

  images: np.ndarray
  numbers: np.ndarray
  tokens: np.ndarray
  owners: np.ndarray

  @property
  def first_tokens(self) -> np.ndarray:
    """The first caption (B, L) of each image."""
    return self.tokens[np.searchsorted(self.owners, np.arange(len(self.numbers)))]


@dataclasses.dataclass(frozen=True)
class CaptionedBatches:
  """Random access to captioned images (for `data.iterate`).

  Attributes:
    source: the records.
    transform: makes views; holds the tokenizer.
    numbers: the records wanted, in this order.
    batch_size: records at a time.
  """

  source: data.Source
  transform: data.Transform
  numbers: Sequence[int]
  batch_size: int

  def __len__(self) -> int:
    return math.ceil(len(self.numbers) / self.batch_size)

  def __getitem__(self, element: int) -> CaptionedImages:
    first = int(element) * self.batch_size
    wanted = [int(number) for number in self.numbers[first : first + self.batch_size]]
    images, numbers, tokens, owners = [], [], [], []
    for number, record in zip(wanted, read_each(self.source, wanted)):
      try:
        if isinstance(record, BadRecord):
          continue
        captions = self._captions(record)
        images.append(self.transform.view(record['image']))
      except BadRecord:
        continue
      tokens += captions
      owners += [len(numbers)] * len(captions)
      numbers.append(number)
    size, length = self.transform.image_size, self.transform.text_length
    return CaptionedImages(
      np.array(images, np.uint8).reshape(-1, size, size, 3),
      np.array(numbers, np.int32),
      np.array(tokens, np.int32).reshape(-1, length),
      np.array(owners, np.int32),
    )

  def _captions(self, record: Record) -> list[np.ndarray]:
    """The usable captions of a record.

    Raises:
      BadRecord: there is none.
    """
    given, found = record['caption'], []
    encode, length = self.transform.tokenizer.encode, self.transform.text_length
    for caption in given if isinstance(given, list) else [given]:
      try:
        found.append(encode(check_caption(caption), length))
      except BadRecord:
        continue
    if not found:
      raise BadRecord('no usable caption')
    return found
