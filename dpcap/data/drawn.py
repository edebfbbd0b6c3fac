"""What sources have in common whose records are drawn: functions of split and index.

Any number of records, nothing on disk, no network.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from dpcap.data.contents import Drawn
from dpcap.data.source import Record
from dpcap.errors import UserError

_SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class DrawnSource:
  """A source of `size` records (see `Source`), which a subclass draws.

  Attributes:
    split: 'train', 'validation' or 'test'; splits share no random numbers.
    size: number of records.
    image_size: side of the images in pixels.

  Raises:
    UserError: an unknown split, a size or image_size below 1.
  """

  KIND: ClassVar[str]  # the source's name in a config
  KEY: ClassVar[int]  # of all random numbers; another number is another data set

  split: str
  size: int
  image_size: int

  def __post_init__(self):
    self._check_choice('split', _SPLITS)
    for name in ('size', 'image_size'):
      self._check_positive(name)

  @property
  def fingerprint(self) -> str:
    """The record of every index follows from these."""
    return repr(self)

  @property
  def contents(self) -> Drawn:
    """Which records; nothing else changes what all of them have in common."""
    return Drawn(self.KIND, self.split, self.size)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Record:
    """Image uint8 (image_size, image_size, 3), caption and label of one record."""
    if not 0 <= index < self.size:
      raise IndexError(f'{self.KIND}: index {index} is outside [0, {self.size})')
    return self._draw(index)

  def _draw(self, index: int) -> Record:
    raise NotImplementedError

  def _rng(self, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of an index; each stream has others."""
    counter = np.array([0, stream, index, _SPLITS.index(self.split)], np.uint64)
    return np.random.Generator(np.random.Philox(key=self.KEY, counter=counter))

  def _check_choice(self, name: str, allowed: tuple[str, ...]):
    if getattr(self, name) not in allowed:
      value = repr(getattr(self, name))
      raise UserError(f'{self.KIND}: {name} is {value}; allowed: {", ".join(allowed)}')

  def _check_positive(self, name: str):
    if getattr(self, name) < 1:
      raise UserError(f'{self.KIND}: {name} is {getattr(self, name)}; it must be at least 1')
