"""Worker processes that hang or die: found by the time that a run waits, or by their end, and
named by what they were reading.

A store or a network file system that never answers would stop a run without a word.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# What a worker says of itself: its process id, 0 before it has started, then the element that it
# makes and the record that it reads, -1 before it does.
_PROCESS, _ELEMENT, _RECORD = 0, 1, 2
_FIELDS = 3

# Until a process has imported what it needs, which says nothing of what it will read.
START_TIMEOUT_S = 600.0

_own: np.ndarray | None = None  # the row of this process, if it is a worker


class Place(NamedTuple):
  """Where a worker was: the element that it made and the record that it read; -1: none yet."""

  element: int
  record: int


def join(file: str, worker: int) -> None:
  """Makes this process worker number `worker` of the watchdog whose file that is."""
  global _own
  _own = np.memmap(file, np.int64, 'r+').reshape(-1, _FIELDS)[worker]
  _own[_PROCESS] = os.getpid()


def follow_parent() -> None:
  """Ties the life of this process to the one that started it, however that ends."""
  # Ctrl-C and schedulers signal the whole group: to stop and save is the main process's part.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def making(element: int) -> None:
  """Says that this worker now makes that element; nothing where it is no worker."""
  if _own is not None:
    # Not both at once: a record must not be taken for one of the element before it.
    _own[_RECORD] = -1
    _own[_ELEMENT] = element


def reading(record: int) -> None:
  """Says that this worker now reads and decodes that record; nothing where it is no worker."""
  if _own is not None:
    _own[_RECORD] = record


class Watchdog:
  """Kills the worker that the run has waited for too long; a context manager.

  Attributes:
    file: for `join`.
    hung: the number of the worker that was killed, None while all is well.
  """

  def __init__(self, workers: int, timeout_s: float | None):
    """Watches `workers` processes; the run waits up to timeout_s seconds for each element.

    None: for ever. The time until a worker has started does not count; that has a limit of its own.
    """
    descriptor, self.file = tempfile.mkstemp(prefix='dpcap-workers-')
    os.close(descriptor)
    self.hung: int | None = None
    self._rows = np.memmap(self.file, np.int64, 'w+', shape=(workers, _FIELDS))
    self._rows[:, [_ELEMENT, _RECORD]] = -1
    self._timeout_s = timeout_s
    self._before = {process.pid for process in multiprocessing.active_children()}
    self._waiting: tuple[float, int] | None = None  # since when, for which worker
    self._closed = threading.Event()

  def __enter__(self):
    if self._timeout_s is not None:
      threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, *_):
    self._closed.set()
    os.unlink(self.file)

  @contextlib.contextmanager
  def waiting_for(self, worker: int) -> Iterator[None]:
    """The time inside counts against that worker."""
    self._waiting = (time.monotonic(), worker)
    try:
      yield
    finally:
      self._waiting = None

  def place(self, worker: int) -> Place:
    """Where a worker is, or was when it ended."""
    return Place(*self._rows[worker, [_ELEMENT, _RECORD]].tolist())

  def _watch(self) -> None:
    started = {}  # worker -> when it was first seen to make an element
    while not self._closed.wait(min(1.0, self._timeout_s / 4)):
      now = time.monotonic()
      for worker in np.flatnonzero(self._rows[:, _ELEMENT] >= 0).tolist():
        started.setdefault(worker, now)
      since, worker = self._waiting or (now, -1)
      limit = self._timeout_s if worker in started else START_TIMEOUT_S
      if now - max(since, started.get(worker, since)) <= limit:
        continue
      # One that hangs before it could say which it is: any that has not said so, once it is there.
      known = {*self._before, *self._rows[:, _PROCESS].tolist()}
      silent = [p.pid for p in multiprocessing.active_children() if p.pid not in known]
      process = int(self._rows[worker, _PROCESS])
      if pids := [process] if process else silent:
        self.hung = worker
        for pid in pids:
          # Grain notices, and raises in the thread that waits.
          with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return
