"""Elements of random-access batches, loaded ahead in worker processes, some of which may die.

One Grain MapDataset, whose element e is a function of e alone. So a loader that lost a worker
starts again with the element that the run waits for, and the run knows nothing of it: it gets the
elements that it would have got.
"""

import contextlib
import functools
import re
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import grain
from absl import flags

from dpcap.data import guarded, shared_memory, watchdog
from dpcap.data.byte_ranges import StoreError
from dpcap.errors import UserError

# Far beyond what a chunk takes, and what a store takes that still answers in the end.
WORKER_TIMEOUT_S = 600.0
# Records that hang one after the other: it is the store that does not answer.
_MOST_HANGS = 3
_GO_ON = 'the same command goes on from the last checkpoint'


class _Loss(NamedTuple):
  """A worker that died, or was killed because it hung; where it was, and how it ended."""

  worker: int
  place: watchdog.Place
  hung: bool
  exit_code: int


class _LostWorker(Exception):
  """A worker that does not go on; its argument is the _Loss."""


def iterate(
  data: Any,
  start: int,
  workers: int,
  buffer: int = 2,
  timeout_s: float | None = WORKER_TIMEOUT_S,
  fatal: Mapping[int, int] | None = None,
  found: Callable[[int, int], None] | None = None,
  say: Callable[[str], None] = lambda line: print(f'warning: {line}', file=sys.stderr, flush=True),
) -> Generator:
  """Elements `start`, `start + 1`, ... of a random-access `data`, loaded ahead.

  Close the generator if it is not read to its end: that ends the workers.

  A worker that dies or hangs does not end this: what it was reading is tried alone
  (`dpcap.data.guarded`), is left out from then on if it ends or hangs that process too, and loading
  goes on with new workers.

  Args:
    data: has a length, items, a `source` of records from which the items are made, and may have
      `element_bytes`, how much memory an item takes.
    start: the first element.
    workers: processes that load; 0 loads in threads of this process.
    buffer: elements that each worker holds ready.
    timeout_s: a worker that keeps the caller waiting for longer, once it has started, is killed;
      None: never.
    fatal: numbers of records (of groups: of their samples) known to end or hang the process that
      reads them -> the first element that leaves them out.
    found: is told of each such record that is found, and that element, before any element is made
      without it.
    say: is told in words of every worker that was lost.

  Raises:
    UserError: if shared memory is too small for the workers, if workers are lost twice at the same
      element without a record to blame, if records hang one after the other, or if the store fails.
  """
  fatal, element, lost_at, hangs = dict(fatal or {}), start, None, 0
  while True:
    batches = guarded.GuardedBatches(data, fatal)
    try:
      with contextlib.closing(_load(batches, element, workers, buffer, timeout_s)) as elements:
        for loaded in elements:
          yield loaded
          element, hangs = element + 1, 0
      return
    except StoreError as e:
      raise UserError(f'{e.filename}: {e.strerror}; {_GO_ON}') from e
    except _LostWorker as lost:
      loss = lost.args[0]
    how, place = _how(loss, timeout_s), loss.place
    what = f'data worker {loss.worker} {how} while it read {_describe(data.source, place.record)}'
    alone = guarded.try_alone(data, place, timeout_s) if place.record >= 0 else None
    if alone is None:
      if lost_at == element:
        raise UserError(f'{what}{_cause(loss)}, and it is not the first one there; {_GO_ON}')
      lost_at = element
      say(f'{what}{_cause(loss)}; another one goes on')
      continue
    hangs += loss.hung
    fatal[place.record] = min(place.element, fatal.get(place.record, place.element))
    if found:
      found(place.record, place.element)
    if hangs == _MOST_HANGS:
      raise UserError(
        f'{what}; {hangs} records in a row hang, each of them alone too: does their store answer?'
        f' {_GO_ON}'
      )
    say(
      f'{what}, and a process that read nothing else {alone}: it is a bad record from now on and'
      ' contributes zero'
    )


def _load(
  batches: guarded.GuardedBatches, start: int, workers: int, buffer: int, timeout_s: float | None
) -> Generator:
  """Elements from `start` on, as long as all workers live.

  Raises:
    _LostWorker: if one dies, or hangs and is killed.
  """
  dataset = grain.MapDataset.source(batches)[start:].to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
  )
  if not workers:
    yield from dataset
    return
  shared_memory.clear_dead()
  shared_memory.check_room(workers * (buffer + 2) * getattr(batches.data, 'element_bytes', 0))
  with contextlib.ExitStack() as stack:
    watch = stack.enter_context(watchdog.Watchdog(workers, timeout_s))
    # Python's tracker of shared memory counts segments that Grain has already freed, and
    # warns of them at exit; it is a process of its own, which takes this option along.
    sys.warnoptions.append('ignore:resource_tracker:UserWarning')
    # Grain reads absl flags here, also in programs that have none.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    elements = iter(
      dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer),
        worker_init_fn=functools.partial(_start_worker, watch.file, shared_memory.owner()),
      )
    )
    stack.callback(elements.close)
    for number in range(len(batches) - start):
      worker = number % workers  # they take turns
      try:
        with watch.waiting_for(worker):
          element = next(elements)
      except RuntimeError as e:
        died = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(e))
        if not died:
          raise
        hung = watch.hung is not None
        raise _LostWorker(_Loss(worker, watch.place(worker), hung, int(died[1]))) from e
      yield element


def _start_worker(watch_file: str, owner: str, worker: int, count: int) -> None:
  del count
  shared_memory.name_segments(owner)
  watchdog.join(watch_file, worker)
  watchdog.follow_parent()


def _how(loss: _Loss, timeout_s: float | None) -> str:
  if loss.hung and loss.place.element < 0:
    return 'did not start and was killed'
  if loss.hung:
    return f'gave nothing for {timeout_s:g} s (data.worker_timeout_s) and was killed'
  return guarded.ending(loss.exit_code)


def _cause(loss: _Loss) -> str:
  """What often ends a process in that way, but for a record."""
  if loss.exit_code == -signal.SIGBUS:
    free = shutil.disk_usage('/dev/shm').free / 2**20
    return f' (is shared memory full? /dev/shm has {free:,.0f} MiB left)'
  if loss.exit_code == -signal.SIGKILL and not loss.hung:
    return ' (out of memory, or killed?)'
  return ''


def _describe(source: Any, record: int) -> str:
  if record < 0:
    return 'no record yet'
  # Sources of many files say in which one it is.
  where = getattr(source, 'where', None)
  return f'record {record} of {where(record)}' if where else f'record {record}'
