"""What a source is made of, and whether two sources share a record.

Images that a model was trained on privately must not be published as if they were others. Two
sources are apart where that is known:

| sources | apart |
| --- | --- |
| scenes or textures, and anything else | always: they are drawn, not read |
| scenes and scenes, textures and textures | other split (both begin at record 0 of theirs) |
| tar shards and tar shards | no shard and no image file in common |
| image files and image files | no file in common |
| one build of a TFDS data set | no record of a file in common |
| two TFDS data sets, or versions, configs or builds of one | cannot be told |
| files of different kinds | cannot be told |

An image file is known again by its size and its first 4 KiB, wherever it lies and whatever it is
called, also with another caption. Where at least half of the smaller set are in the other, it was
taken from there; fewer may be chance, which cannot be told. The same picture encoded anew is
another file: who knows that a set was made from the training images has to say so. Splits of a
TFDS data set are taken at their word.
"""

import concurrent.futures
import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

# Enough for pictures with the same header to differ, and no more than one read of a disk.
HEAD = 4096
# Kinds whose records are functions of their index: they come from no data, and none is anybody's.
GENERATED = ('scenes', 'textures')
# Storage sets the pace. More tables at a time would fill the memory.
_THREADS = 16


class Relation(NamedTuple):
  """What is known of two sources.

  Attributes:
    apart: True: they share no record; False: they do; None: it cannot be told.
    why: for people.
  """

  apart: bool | None
  why: str


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Records 0 to `size` of a split, functions of their index; `kind` is one of GENERATED."""

  kind: str
  split: str
  size: int

  def compare(self, other: 'Drawn') -> Relation:
    """Of one kind: splits share no random numbers; two ranges of one both begin at 0."""
    if self.split != other.split:
      return Relation(True, f'{self.kind} of split {self.split}, and of {other.split}')
    return Relation(False, f'both have {self.kind} of split {self.split}')


@dataclasses.dataclass(frozen=True)
class ImageFiles:
  """Image files, packed or loose.

  Attributes:
    kind: 'tar_shards' or 'image_folder'.
    fingerprint: of the source; those of one are equal.
    places: real paths or URLs of shards; one in common is a record in common.
    parts: functions that read the ids (n,) uint64 of some of the files each, see `image_ids`.
    count: files.
  """

  kind: str
  fingerprint: str
  places: frozenset[str]
  parts: Sequence[Callable[[], np.ndarray]] = dataclasses.field(compare=False)
  count: int

  def compare(self, other: 'ImageFiles') -> Relation:
    """By place, then the ids of the fewer files are held against those of the others.

    Raises:
      OSError: a file or index cannot be read.
    """
    both = self.places & other.places
    if both:
      return Relation(False, f'both read {min(both)}')
    few, many = sorted((self, other), key=lambda files: files.count)
    ids = np.unique(np.concatenate([np.zeros(1, np.uint64), *_each(few.parts)]))[1:]
    found = np.zeros(len(ids), bool)
    for part in _each(many.parts if len(ids) else ()):
      places = np.minimum(np.searchsorted(ids, part), len(ids) - 1)
      found[places[ids[places] == part]] = True
    common = int(found.sum())
    if not common:
      return Relation(True, f'none of {few.count:,} image files is among {many.count:,}')
    why = f'{common:,} of {len(ids):,} image files are among {many.count:,}'
    return Relation(False if 2 * common >= len(ids) else None, why)


@dataclasses.dataclass(frozen=True)
class PreparedRecords:
  """Records of a TFDS data set.

  Attributes:
    name: NAME/CONFIG:VERSION.
    build: tells one preparation of it from another that was cut otherwise; copies have the same.
    ranges: (file name, first record, record after the last).
  """

  kind: ClassVar[str] = 'tfds'
  name: str
  build: str
  ranges: tuple[tuple[str, int, int], ...]

  def compare(self, other: 'PreparedRecords') -> Relation:
    """By file and range within one build; a name says nothing of what another data set holds."""
    if self.name != other.name:
      return Relation(None, f'{self.name} and {other.name} may hold the same images')
    if self.build != other.build:
      return Relation(None, f'two builds of {self.name} may have the same images in other places')
    taken = {}
    for file, start, stop in self.ranges:
      taken.setdefault(file, []).append((start, stop))
    for file, start, stop in other.ranges:
      if any(start < end and begin < stop for begin, end in taken.get(file, ())):
        return Relation(False, f'both read records of {file}')
    return Relation(True, f'other records of {self.name}')


Contents = Drawn | ImageFiles | PreparedRecords


def compare(a: Contents, b: Contents) -> Relation:
  """Whether two sources share a record, as far as that is known; see above."""
  kinds = compare_kinds(a.kind, b.kind)
  if kinds is not None:
    return kinds
  try:
    return a.compare(b)
  except OSError as e:
    return Relation(None, f'{e.filename or "a file"} cannot be read ({e.strerror or e})')


def compare_kinds(a: str, b: str) -> Relation | None:
  """What the kinds of two sources (their names in a config) say; None: it takes a closer look."""
  if a == b:
    return None
  for kind in GENERATED:
    if kind in (a, b):
      return Relation(True, f'{kind} are drawn by rules of their own, not read from files')
  return Relation(None, f'{a} and {b} are different kinds of files')


def known_apart(a: Contents, b: Contents) -> bool:
  """Whether two sources are known to share no record."""
  return compare(a, b).apart is True


def image_ids(sizes: np.ndarray, checksums: np.ndarray) -> np.ndarray:
  """What image files are known by, uint64; 0: there is no image.

  Args:
    sizes: in bytes, the low 32 bits.
    checksums: of their first bytes, see `checksum`; 0 where there are none.
  """
  return sizes.astype(np.uint64) << np.uint64(32) | checksums.astype(np.uint64)


def checksum(head: bytes) -> int:
  """32 bits of the first HEAD bytes of a file, or of all of it."""
  return zlib.crc32(head)


def read_image_ids(paths: Sequence[str]) -> np.ndarray:
  """The ids (n,) uint64 of local image files; 0 where there is none.

  Raises:
    OSError: a file cannot be read.
  """
  found = np.zeros((len(paths), 2), np.uint64)
  for row, path in zip(found, paths):
    try:
      with open(path, 'rb') as file:
        row[:] = os.fstat(file.fileno()).st_size & 0xFFFFFFFF, checksum(file.read(HEAD))
    except FileNotFoundError:
      continue
  return image_ids(found[:, 0], found[:, 1])


def _each(parts: Sequence[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
  """The ids of each part, some parts ahead of what is used."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for start in range(0, len(parts), _THREADS):
      yield from pool.map(lambda part: part(), parts[start : start + _THREADS])
