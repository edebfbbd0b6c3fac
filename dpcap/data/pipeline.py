"""From drawn indices to masked physical batches, in worker processes.

A logical batch is what one step draws; its size varies. It is cut into physical batches
of a fixed size, the last one padded and masked, and physical batches travel in chunks.
The pipeline is one Grain MapDataset whose element e is a function of e alone, so that
order does not depend on the number of workers and a run resumes at any step by seeking.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from dpcap.data import image as image_ops
from dpcap.data import watchdog
from dpcap.data.byte_ranges import StoreError
from dpcap.data.source import BadRecord, Record, Source, choose_caption, read_each
from dpcap.data.text import Tokenizer
from dpcap.errors import UserError

# Bad records whose reason a chunk carries along; the count is always whole.
_REASONS_KEPT = 3
# Far beyond what a chunk takes, and what a store takes that still answers in the end.
WORKER_TIMEOUT_S = 600.0
_GO_ON = 'the same command goes on from the last checkpoint'


class Examples(NamedTuple):
  """What the model is trained on, with any leading axes.

  Attributes:
    image: uint8 (..., H, W, 3); normalised on the device.
    tokens: int32 (..., text_length).
  """

  image: np.ndarray
  tokens: np.ndarray


class Chunk(NamedTuple):
  """Some physical batches of one logical batch, for the rows of a mesh that a process has.

  Attributes:
    examples: leading axes (rows, batches, physical_batch).
    mask: bool (rows, batches, physical_batch); False is padding or a bad record.
    live: int32 (rows,), how many of a row's physical batches hold any example; the rest is
      all padding.
    drawn: how many indices the chunk stands for, good and bad.
    bad: how many of them are bad records.
    reasons: 'record INDEX: why' of the first few bad ones.
  """

  examples: Examples
  mask: np.ndarray
  live: np.ndarray
  drawn: int
  bad: int
  reasons: list[str]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a record becomes an example.

  Attributes:
    image_size: side of the square image in pixels.
    text_length: tokens, with [CLS], [SEP] and padding.
    tokenizer: see `Tokenizer`.
    crop_scale: range of the area of a RandomResizedCrop, or None for the deterministic
      view that evaluation takes (an image that has the right size already stays as it is).
    flip: whether to mirror at random.
  """

  image_size: int
  text_length: int
  tokenizer: Tokenizer
  crop_scale: tuple[float, float] | None = None
  flip: bool = False

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Examples:
    """One example, without leading axes.

    Args:
      record: of a source.
      rng: draws the crop, the flip and, of several captions, one; None: no augmentation, and the
        first caption.

    Raises:
      BadRecord: if the image cannot be decoded, or there is no usable caption.
    """
    caption = choose_caption(record['caption'], rng)
    tokens = self.tokenizer.encode(caption, self.text_length)
    return Examples(self.view(record['image'], rng), tokens)

  def view(self, image: bytes | np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """The image as uint8 (image_size, image_size, 3).

    Raises:
      BadRecord: if the image cannot be decoded.
    """
    size = self.image_size
    if self.crop_scale is not None:
      opened = image_ops.open_image(image)
      array = image_ops.random_resized_crop(opened, size, rng, self.crop_scale)
    elif isinstance(image, np.ndarray) and image.shape == (size, size, 3):
      array = image
    else:
      array = image_ops.resize_center_crop(image_ops.open_image(image), size)
    return image_ops.random_flip(array, rng) if self.flip else array


def _read(source: Source, indices: Sequence[int]) -> Iterator[tuple[int, Record | BadRecord]]:
  records = read_each(source, indices)
  for index in indices:
    watchdog.reading(index)
    yield index, next(records)


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
    augmentation_rng: (step, index) -> the generator that augments it.
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
    size, length = self.transform.image_size, self.transform.text_length
    images = np.zeros((len(parts), self.chunk_size, size, size, 3), np.uint8)
    tokens = np.zeros((len(parts), self.chunk_size, length), np.int32)
    mask = np.zeros((len(parts), self.chunk_size), bool)
    reasons = []
    places = [(row, i) for row, part in enumerate(parts) for i in range(len(part))]
    drawn = np.concatenate(parts).tolist()
    for place, (index, record) in zip(places, _read(self.source, drawn), strict=True):
      try:
        if isinstance(record, BadRecord):
          raise record
        images[place], tokens[place] = self.transform(record, self.augmentation_rng(step, index))
        mask[place] = True
      except BadRecord as bad:
        reasons.append(f'record {index}: {bad}')
    shape = (len(parts), self.batches_per_chunk, self.physical_batch)
    return Chunk(
      examples=Examples(images.reshape(*shape, size, size, 3), tokens.reshape(*shape, length)),
      mask=mask.reshape(shape),
      live=np.array([math.ceil(len(part) / self.physical_batch) for part in parts], np.int32),
      drawn=sum(map(len, parts)),
      bad=len(reasons),
      reasons=reasons[:_REASONS_KEPT],
    )


def iterate(
  data, start: int, workers: int, buffer: int = 2, timeout_s: float | None = WORKER_TIMEOUT_S
) -> Generator:
  """Elements `start`, `start + 1`, ... of a random-access `data`, loaded ahead.

  Close the generator if it is not read to its end: that ends the workers.

  Args:
    data: anything with a length and items, as LogicalBatches.
    start: the first element.
    workers: processes that load; 0 loads in threads of this process.
    buffer: elements that each worker holds ready.
    timeout_s: a worker that keeps the caller waiting for longer is killed; None: never.

  Raises:
    UserError: if a worker dies or hangs, or the store fails.
  """
  dataset = grain.MapDataset.source(data)[start:].to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
  )
  watch = None
  with contextlib.ExitStack() as stack:
    if workers:
      if timeout_s is not None:
        watch = stack.enter_context(watchdog.Watchdog(workers, timeout_s))
      # Python's tracker of shared memory counts segments that Grain has already freed, and
      # warns of them at exit; it is a process of its own, which takes this option along.
      sys.warnoptions.append('ignore:resource_tracker:UserWarning')
      # Grain reads absl flags here, also in programs that have none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer),
        worker_init_fn=functools.partial(_start_worker, watch.file if watch else None),
      )
    elements = iter(dataset)
    if workers:
      stack.callback(elements.close)
    try:
      for number in itertools.count():
        # Workers take turns.
        with watch.waiting_for(number % workers) if watch else contextlib.nullcontext():
          element = next(elements, None)
        if element is None:
          return
        yield element
    except StoreError as e:
      raise UserError(f'{e.filename}: {e.strerror}; {_GO_ON}') from e
    except RuntimeError as e:
      if 'terminated unexpectedly' not in str(e):
        raise
      if watch and watch.hung:
        worker, record = watch.hung
        raise UserError(
          f'data worker {worker} gave nothing for {timeout_s:g} s (data.worker_timeout_s) and was'
          f' killed; it was reading {_describe(data.source, record)}; {_GO_ON}'
        ) from e
      raise UserError(f'a data worker died (out of memory, or killed?): {e}; {_GO_ON}') from e


def _describe(source: Source, record: int) -> str:
  if record < 0:
    return 'no record yet'
  # Sources of many files say in which one it is.
  where = getattr(source, 'where', None)
  return f'record {record} of {where(record)}' if where else f'record {record}'


def _start_worker(watch_file: str | None, worker: int, count: int) -> None:
  """Ties the life of this worker process to the one that started it, however that ends."""
  del count
  if watch_file:
    watchdog.join(watch_file, worker)
  # Ctrl-C and schedulers signal the whole group: to stop and save is the main process's part.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


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
    for i, (_, record) in enumerate(_read(self.source, indices)):
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

  def __len__(self) -> int:
    return len(range(self.first, len(self.batches), self.n))

  def __getitem__(self, element: int) -> Any:
    return self.batches[self.first + int(element) * self.n]
