"""Times the input pipeline against a bare loop of its decoder, and what else feeds a step.

    python -m tools.bench_input [SHARDS] [--images=512] [--workers=2] [--rounds=7]

SHARDS is a path as data.source.path takes it; without it, JPEGs of web size are made up. Prints
JSON lines to stdout, a table to stderr. Each line has `what` and `case`, and of `what`:

  pipeline  `pipeline`: tar shards -> decoded, RandomResizedCrop(224), flipped, tokenised, batched,
            by worker processes as a run has them; `bare loop`: decoding and that crop alone, of the
            same images with the same boxes from memory, in as many processes. `images_per_s`,
            `ratio` to the bare loop in the same round, its `quartiles`.
  stage     microseconds per image in one process: where the pipeline's time goes; `ratio` to the
            decoding and crop.
  reading   every record of the shards by: `tarfile stream` (front to end, as webdataset does),
            `index, in order` and `index, shuffled`; `mb_per_s`, and `ratio` of the time to that of
            the tarfile stream; with the files in memory (`cached`) or dropped from it (`dropped`).
  draw      `seconds` of one step's Poisson draw, 1.31 million of 233.8 million, on one core.

Workers are halted while the loop runs, so that the two never share the cores; what else the machine
does hits both alike, and `ratio` is the figure to trust. Exits 2 if an option is wrong.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import random
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dpcap import data
from dpcap.data import image as image_ops
from dpcap.errors import UserError
from dpcap.privacy.sampling import PoissonSampler, augmentation_generator
from tools.arguments import Parser, program
from tools.bench_parts.photos import make_shards

_SIZE, _TEXT_LENGTH = 224, 40
_KEY = (1, 2)
_PHYSICAL_BATCH, _BATCHES_PER_CHUNK = 16, 8
_LAION, _BATCH = 233_804_767, 1_310_720
_STAGE_IMAGES = 64


class _Everything:
  """Draws all records in every step: what is timed must not vary."""

  def __init__(self, count: int):
    self._count = count

  def __call__(self, step: int) -> np.ndarray:
    del step
    return np.arange(self._count)


def make_batches(source: data.Source, steps: int) -> data.LogicalBatches:
  """The pipeline of a run at 224 px that draws everything in each of `steps` steps."""
  tokenizer = data.make_tokenizer('wordpiece', data.SCENES_VOCABULARY)
  return data.LogicalBatches(
    source=source,
    transform=data.Transform(_SIZE, _TEXT_LENGTH, tokenizer, (0.2, 1.0), flip=True),
    draw=_Everything(len(source)),
    augmentation_rng=functools.partial(augmentation_generator, _KEY),
    steps=steps,
    expected_batch_size=len(source),
    physical_batch=_PHYSICAL_BATCH,
    batches_per_chunk=_BATCHES_PER_CHUNK,
  )


def _decode_and_crop(image: bytes, rng: np.random.Generator) -> np.ndarray:
  return image_ops.random_resized_crop(image_ops.open_image(image), _SIZE, rng)


def _bare_loop(pipe, source: data.Source, numbers: range) -> None:
  """Runs in a process: for each step that is sent, decodes its images and returns the seconds."""
  records = [(i, source[i]['image']) for i in numbers]
  pipe.send(None)
  while (step := pipe.recv()) is not None:
    rngs = [augmentation_generator(_KEY, step, i) for i, _ in records]
    start = time.perf_counter()
    for (_, image), rng in zip(records, rngs):
      try:
        _decode_and_crop(image, rng)
      except data.source.BadRecord:
        continue
    pipe.send(time.perf_counter() - start)


class _BareLoops:
  """`workers` processes with the bare loop; call it with a step for their images per second."""

  def __init__(self, source: data.Source, workers: int):
    context = multiprocessing.get_context('spawn')
    self._pipes, self._counts = [], []
    for worker in range(workers):
      numbers = range(worker, len(source), workers)
      here, there = context.Pipe()
      context.Process(target=_bare_loop, args=(there, source, numbers), daemon=True).start()
      self._pipes.append(here)
      self._counts.append(len(numbers))
    self.pids = {process.pid for process in multiprocessing.active_children()}
    for pipe in self._pipes:
      pipe.recv()

  def __call__(self, step: int) -> float:
    for pipe in self._pipes:
      pipe.send(step)
    # Each counts for itself: none is charged for waiting for a slower one.
    return sum(count / pipe.recv() for count, pipe in zip(self._counts, self._pipes))

  def close(self) -> None:
    for pipe in self._pipes:
      pipe.send(None)


def time_pipeline(
  source: data.Source, workers: int, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """The lines of `pipeline`; a round is a step of each."""
  batches = make_batches(source, rounds + 2)
  bare = _BareLoops(source, workers)
  elements = data.iterate(batches, 0, workers)
  rates = {'bare loop': [], 'pipeline': []}
  try:
    for _ in range(batches.slots):
      next(elements)
    loaders = [p.pid for p in multiprocessing.active_children() if p.pid not in bare.pids]
    for number in range(rounds):
      say(f'pipeline, round {number + 1} of {rounds}')
      for pid in loaders:
        os.kill(pid, signal.SIGSTOP)
      rates['bare loop'].append(bare(number + 1))
      for pid in loaders:
        os.kill(pid, signal.SIGCONT)
      # From the end of one step to the end of the next: what lies ready at the start is made up
      # for by what lies ready at the end.
      start = time.perf_counter()
      for _ in range(batches.slots):
        next(elements)
      rates['pipeline'].append(len(source) / (time.perf_counter() - start))
  finally:
    elements.close()
    bare.close()
  return [
    {
      'what': 'pipeline',
      'case': case,
      'images_per_s': statistics.median(rates[case]),
      **_ratios(rates[case], rates['bare loop']),
      'workers': workers,
      'images': len(source),
      'rounds': rounds,
    }
    for case in rates
  ]


def time_stages(source: data.Source, rounds: int) -> list[dict[str, Any]]:
  """The lines of `stage`."""
  transform = make_batches(source, 1).transform
  count = min(_STAGE_IMAGES, len(source))
  numbers = list(range(count))
  rngs = []
  records = []
  for record in data.source.read_each(source, numbers):
    if not isinstance(record, data.source.BadRecord):
      records.append(record)
  captions = [data.source.choose_caption(record['caption']) for record in records]
  batch = np.zeros((count, _SIZE, _SIZE, 3), np.uint8)
  view = np.ascontiguousarray(batch[0])

  def copy():
    for i, rng in zip(numbers, rngs):
      batch[i] = image_ops.random_flip(view, rng)

  def decode():
    for record, rng in zip(records, rngs):
      _decode_and_crop(record['image'], rng)

  stages = {
    'decode and crop': decode,
    'read': lambda: list(data.source.read_each(source, numbers)),
    'random generator': lambda: [augmentation_generator(_KEY, 0, i) for i in numbers],
    'tokenise': lambda: [transform.tokenizer.encode(text, _TEXT_LENGTH) for text in captions],
    'flip and copy into the batch': copy,
    'normalise (in a run: on the device)': lambda: [image_ops.normalize(view) for _ in numbers],
  }
  seconds = {name: [] for name in stages}
  for number in range(rounds):
    for name in random.Random(number).sample(list(stages), len(stages)):
      rngs = [augmentation_generator(_KEY, number, i) for i in numbers]
      start = time.perf_counter()
      stages[name]()
      seconds[name].append((time.perf_counter() - start) / count)
  return [
    {
      'what': 'stage',
      'case': name,
      'us_per_image': 1e6 * statistics.median(seconds[name]),
      **_ratios(seconds[name], seconds['decode and crop']),
    }
    for name in stages
  ]


def _stream(shards: list[str]) -> Iterator[bytes]:
  for shard in shards:
    with open(shard, 'rb') as file, tarfile.open(fileobj=file, mode='r|') as tar:
      for member in tar:
        if member.name.endswith(('.jpg', '.txt')):
          yield tar.extractfile(member).read()


def time_reading(source: data.TarShards, rounds: int) -> list[dict[str, Any]]:
  """The lines of `reading`; the shards must be local."""
  shards = sorted({source.where(i) for i in range(len(source))})
  order = np.random.default_rng(0).permutation(len(source)).tolist()
  size = sum(os.path.getsize(shard) for shard in shards)
  chunk = _PHYSICAL_BATCH * _BATCHES_PER_CHUNK

  def through_index(numbers):
    for first in range(0, len(numbers), chunk):
      yield from data.source.read_each(source, numbers[first : first + chunk])

  ways = {
    'tarfile stream': lambda: _stream(shards),
    'index, in order': lambda: through_index(range(len(source))),
    'index, shuffled': lambda: through_index(order),
  }
  lines = []
  for state in ('cached', 'dropped'):
    seconds = {name: [] for name in ways}
    for number in range(rounds):
      for name in random.Random(number).sample(list(ways), len(ways)):
        for shard in shards:
          with open(shard, 'rb') as file:
            if state == 'dropped':
              os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
              file.read()
        start = time.perf_counter()
        for _ in ways[name]():
          pass
        seconds[name].append(time.perf_counter() - start)
    lines += [
      {
        'what': 'reading',
        'case': f'{name}, {state}',
        'mb_per_s': size / 1e6 / statistics.median(seconds[name]),
        **_ratios(seconds[name], seconds['tarfile stream']),
      }
      for name in ways
    ]
  return lines


def time_draw(rounds: int) -> list[dict[str, Any]]:
  """The line of `draw`."""
  sampler = PoissonSampler(_LAION, _BATCH, _KEY)
  seconds = []
  for step in range(rounds):
    start = time.perf_counter()
    sampler.draw(step)
    seconds.append(time.perf_counter() - start)
  case = f'{_BATCH:,} of {_LAION:,}'
  return [{'what': 'draw', 'case': case, 'seconds': statistics.median(seconds)}]


def _ratios(values: list[float], base: list[float]) -> dict[str, Any]:
  ratios = [a / b for a, b in zip(values, base)]
  return {'ratio': statistics.median(ratios), 'quartiles': [*np.percentile(ratios, (25, 75))]}


def _show(lines: list[dict[str, Any]]) -> None:
  console = Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else 110)
  table = Table('what', 'case')
  for title in ('', 'ratio', 'quartiles'):
    table.add_column(title, justify='right', no_wrap=True)
  units = {'images_per_s': 'images/s', 'us_per_image': 'us', 'mb_per_s': 'MB/s', 'seconds': 's'}
  for line in lines:
    figure = next(f'{line[key]:,.4g} {unit}' for key, unit in units.items() if key in line)
    ratio = f'{line["ratio"]:.3f}' if 'ratio' in line else ''
    quartiles = ' – '.join(f'{x:.3f}' for x in line.get('quartiles', ()))
    table.add_row(line['what'], line['case'], figure, ratio, quartiles)
  console.print(table)


def _at_least_one(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} must be a whole number of at least 1')
  return int(text)


@program
def main(argv: list[str] | None) -> None:
  """Times everything and prints it."""
  parser = Parser('tools.bench_input', __doc__)
  add = parser.add_argument
  add('shards', nargs='?', help='path of local tar shards; made up if not given')
  add('--images', type=_at_least_one, default=512, help='how many are made up')
  add('--workers', type=_at_least_one, default=os.cpu_count(), help='processes; one per core')
  add('--rounds', type=_at_least_one, default=7, help='timed rounds of everything')
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    path = options.shards
    if path is None:
      make_shards(pathlib.Path(folder), options.images)
      path = folder
    source = data.TarShards(path, index_dir=folder)
    if not data.byte_ranges.is_local(source.where(0)):
      raise UserError(f'{path}: is remote; expected shards on a local disk')
    lines = time_draw(options.rounds)
    lines += time_reading(source, options.rounds)
    lines += time_stages(source, options.rounds)
    with Console(stderr=True).status('') as shown:
      lines += time_pipeline(source, options.workers, options.rounds, shown.update)
  for line in lines:
    print(json.dumps(line))
  _show(lines)


if __name__ == '__main__':
  sys.exit(main())
