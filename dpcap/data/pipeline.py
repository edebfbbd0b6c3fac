"""From drawn indices to masked physical batches; `loading` makes them in worker processes.

A logical batch is what one step draws; its size varies. It is cut into physical batches
of a fixed size, the last one padded and masked, and physical batches travel in chunks.
Element e of all chunks is a function of e alone, so that order does not depend on the number of
workers and a run resumes at any step by seeking.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpcap.data import guarded
from dpcap.data.examples import Example, Transform
from dpcap.data.source import BadRecord, Source, read_each

# Bad records whose reason a chunk carries along; the count is always whole.
_REASONS_KEPT = 3


class Chunk(NamedTuple):
  """Some physical batches of one logical batch, for the rows of a mesh that a process has.

  Attributes:
    examples: field -> array with leading axes (rows, batches, physical_batch).
    mask: bool (rows, batches, physical_batch); False is padding or a bad record.
    live: int32 (rows,), how many of a row's physical batches hold any example; the rest is
      all padding.
    drawn: how many indices the chunk stands for, good and bad.
    bad: how many of them are bad records.
    reasons: 'record INDEX: why' of the first few bad ones.
  """

  examples: Example
  mask: np.ndarray
  live: np.ndarray
  drawn: int
  bad: int
  reasons: list[str]


@functools.lru_cache(maxsize=2)
def _draw_once(draw: Callable[[int], np.ndarray], step: int) -> np.ndarray:
  """The draw of a step, which all of its elements share."""
  return draw(step)


@dataclasses.dataclass(frozen=True)
class LogicalBatches:
  """Random access to all chunks of a run, in order: what Grain reads from.

  Every process draws the whole logical batch, which takes it no time, and cuts it into
  equal parts, one for each row of the mesh (sizes differ by one at most). So a draw does
  not depend on how many processes there are, all of them have the same number of chunks
  without asking each other, and a row reads from a part of the data that hardly moves.

  Element `step * slots + s` is a list of chunks: one for the slots that the draw of that
  step fills, none for those that it leaves empty, and in the last slot all that is left
  however unlucky the draw, so that no example is ever dropped.

  Attributes:
    source: where records come from.
    transform: how they become examples.
    draw: step -> ascending indices of the logical batch.
    augmentation_rng: (step, index) -> the generator that augments it, and of a group draws one.
    steps: of the whole run.
    expected_batch_size: mean length of a draw.
    physical_batch: examples per physical batch.
    batches_per_chunk: physical batches per chunk and row.
    rows: of the mesh, those of all processes.
    local_rows: the rows of this process.
  """

  source: Source
  transform: Transform
  # Both hold the sampling key, which must not show where this is printed.
  draw: Callable[[int], np.ndarray] = dataclasses.field(repr=False)
  augmentation_rng: Callable[[int, int], np.random.Generator] = dataclasses.field(repr=False)
  steps: int
  expected_batch_size: int
  physical_batch: int
  batches_per_chunk: int
  rows: int = 1
  local_rows: range = range(1)

  @property
  def chunk_size(self) -> int:
    """Examples per chunk and row."""
    return self.physical_batch * self.batches_per_chunk

  @property
  def slots(self) -> int:
    """Elements per step: enough for a draw six standard deviations above the mean."""
    b = self.expected_batch_size
    return math.ceil((b + 6 * math.sqrt(b)) / (self.rows * self.chunk_size))

  @property
  def element_bytes(self) -> int:
    """Memory of an element: one chunk, but for the last of a step that had an unlucky draw."""
    one = sum(
      math.prod(field.shape) * np.dtype(field.dtype).itemsize
      for field in self.transform.shapes.values()
    )
    return len(self.local_rows) * self.chunk_size * one

  def __len__(self) -> int:
    return self.steps * self.slots

  def __getitem__(self, element: int) -> list[Chunk]:
    step, slot = divmod(int(element), self.slots)
    indices = _draw_once(self.draw, step)
    longest = math.ceil(len(indices) / self.rows)
    first = slot * self.chunk_size
    stop = first + self.chunk_size if slot < self.slots - 1 else longest
    cut = lambda row: row * len(indices) // self.rows
    parts = [indices[cut(row) : cut(row + 1)] for row in self.local_rows]
    return [
      self._chunk(step, [part[i : i + self.chunk_size] for part in parts])
      for i in range(first, min(stop, longest), self.chunk_size)
    ]

  def _chunk(self, step: int, parts: list[np.ndarray]) -> Chunk:
    lead = (len(parts), self.chunk_size)
    shapes = self.transform.shapes
    examples = {name: np.zeros(lead + field.shape, field.dtype) for name, field in shapes.items()}
    mask = np.zeros(lead, bool)
    reasons = []
    places = [(row, i) for row, part in enumerate(parts) for i in range(len(part))]
    drawn = np.concatenate(parts).tolist()
    rngs = [self.augmentation_rng(step, index) for index in drawn]
    records = read_each(self.source, drawn, rngs)
    for place, index, rng, record in zip(places, drawn, rngs, records, strict=True):
      try:
        if isinstance(record, BadRecord):
          raise record
        example = self.transform(record, rng)
        for name, array in examples.items():
          array[place] = example[name]
        mask[place] = True
      except BadRecord as bad:
        reasons.append(f'record {index}: {bad}')
    shape = (len(parts), self.batches_per_chunk, self.physical_batch)
    return Chunk(
      examples={name: x.reshape(shape + shapes[name].shape) for name, x in examples.items()},
      mask=mask.reshape(shape),
      live=np.array([math.ceil(len(part) / self.physical_batch) for part in parts], np.int32),
      drawn=sum(map(len, parts)),
      bad=len(reasons),
      reasons=reasons[:_REASONS_KEPT],
    )


class LabelledImages(NamedTuple):
  """A batch to evaluate on.

  Attributes:
    images: uint8 (B, H, W, 3).
    labels: (B,), -1 where unusable.
    numbers: (B,), their places in the source.
  """

  images: np.ndarray
  labels: np.ndarray
  numbers: np.ndarray


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
  """Random access to a source in order, in batches of up to `batch_size` (for `iterate`).

  An image that cannot be decoded has label -1 and is black.
  """

  source: Source
  transform: Transform
  batch_size: int

  def __len__(self) -> int:
    return math.ceil(len(self.source) / self.batch_size)

  def __getitem__(self, element: int) -> LabelledImages:
    first = int(element) * self.batch_size
    indices = range(first, min(first + self.batch_size, len(self.source)))
    size = self.transform.image_size
    images = np.zeros((len(indices), size, size, 3), np.uint8)
    labels = np.full(len(indices), -1)
    for i, record in enumerate(read_each(self.source, indices)):
      if isinstance(record, BadRecord):
        continue
      try:
        images[i], labels[i] = self.transform.view(record['image']), record['label']
      except BadRecord:
        continue
    return LabelledImages(images, labels, np.array(indices))


@dataclasses.dataclass(frozen=True)
class EveryNth:
  """Of `batches` the number `first`, `first + n`, ... (for `data.iterate`)."""

  batches: Sequence[Any]
  n: int
  first: int

  @property
  def source(self) -> Source:
    return self.batches.source

  def with_source(self, source: Source) -> 'EveryNth':
    return dataclasses.replace(self, batches=guarded.with_source(self.batches, source))

  def __len__(self) -> int:
    return len(range(self.first, len(self.batches), self.n))

  def __getitem__(self, element: int) -> Any:
    return self.batches[self.first + int(element) * self.n]
