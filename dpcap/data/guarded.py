"""Batches that say what they read, and leave out records that nobody survives.

A record can end the process that decodes it (a segmentation fault in a library, more memory than
there is) or keep it for ever. It is known by the watchdog, and tried once more alone, in a process
of its own; if that ends or hangs as well it is fatal: a bad record from then on, which contributes
zero.

Whether a record is fatal depends on it alone, not on those beside which it was read, and it changes
nothing of what they contribute: that is what the sensitivity of a sum of contributions needs. Of a
group of near duplicates one sample is read, and that one is fatal: a step that draws another one
of the group is as if none were, whatever was drawn and found before it.
"""

import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cloudpickle

from dpcap.data import watchdog
from dpcap.data.source import BadRecord, Record, Source, read_each, read_samples


@dataclasses.dataclass(frozen=True)
class Guarded:
  """A source that says what is read, and whose other attributes are those of `source`.

  Attributes:
    source: the records.
    leave_out: number of a sample -> whether it is a bad one here.
  """

  source: Source
  leave_out: Callable[[int], bool]

  def __len__(self) -> int:
    return len(self.source)

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or name == 'source':  # as it is unpickled
      raise AttributeError(name)
    return getattr(self.source, name)

  def __getitem__(self, index: int) -> Record:
    (record,) = read_each(self, [index])
    if isinstance(record, BadRecord):
      raise record
    return record

  def read_samples(self, numbers: Sequence[int]) -> Iterator[Record | BadRecord]:
    """As `dpcap.data.source.read_samples`."""
    records = read_samples(self.source, [i for i in numbers if not self.leave_out(i)])
    for number in numbers:
      if self.leave_out(number):
        yield BadRecord('it ends or hangs the process that reads it')
      else:
        watchdog.reading(number)
        yield next(records)


def with_source(data: Any, source: Source) -> Any:
  """The same batches of another source: by their method of that name, or their field `source`.

  `data` itself where it has neither.
  """
  if hasattr(data, 'with_source'):
    return data.with_source(source)
  if 'source' in getattr(data, '__dataclass_fields__', ()):
    return dataclasses.replace(data, source=source)
  return data


@dataclasses.dataclass(frozen=True)
class GuardedBatches:
  """`data`, whose elements say what they read and leave out what is fatal.

  Attributes:
    data: random access to elements made from records of its `source`.
    fatal: number of a sample -> the first element that leaves it out. What was made before stays as
      it was: a run that computes an earlier step again gets the bits that it had then.
  """

  data: Any
  fatal: Mapping[int, int]

  def __len__(self) -> int:
    return len(self.data)

  def __getitem__(self, element: int) -> Any:
    element = int(element)
    watchdog.making(element)
    leave_out = lambda record: self.fatal.get(record, element + 1) <= element
    return with_source(self.data, Guarded(self.data.source, leave_out))[element]


def try_alone(data: Any, place: watchdog.Place, timeout_s: float | None) -> str | None:
  """Makes an element of `data` without all its records but one, in a process of its own.

  Args:
    data: as of `GuardedBatches`.
    place: the element and the record.
    timeout_s: the process may take so long once it has started; None: for ever.

  Returns:
    How that ended the process, None if it did no harm; an exception does none: whoever reads the
    record next sees it.
  """
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe(duplex=False)
  # By value, as Grain has it: batches may hold functions without a name.
  arguments = (there, cloudpickle.dumps((data, *place)))
  process = context.Process(target=_alone, args=arguments, daemon=True)
  process.start()
  there.close()
  try:
    if not here.poll(watchdog.START_TIMEOUT_S):
      return None
    here.recv()
    process.join(timeout_s)
    if process.exitcode is None:
      return f'gave nothing for {timeout_s:g} s'
    return ending(process.exitcode) if process.exitcode else None
  except EOFError:
    return None  # it never came to the record
  finally:
    process.kill()
    process.join()


def ending(exit_code: int) -> str:
  """How a process ended, in words: 'died (SIGSEGV)' or 'ended with status 3'."""
  if exit_code >= 0:
    return f'ended with status {exit_code}'
  return f'died ({signal_name(-exit_code)})'


def signal_name(number: int) -> str:
  """As SIGKILL."""
  with contextlib.suppress(ValueError):
    return signal.Signals(number).name
  return f'signal {number}'


def _alone(started, arguments: bytes) -> None:
  watchdog.follow_parent()
  data, element, record = cloudpickle.loads(arguments)
  started.send(None)
  with contextlib.suppress(Exception):
    with_source(data, Guarded(data.source, lambda other: other != record))[element]
