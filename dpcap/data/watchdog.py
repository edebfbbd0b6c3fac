"""Worker processes that hang: found by the time that a run waits, named by what they were reading.

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

import numpy as np

# What a worker says of itself: its process id, 0 before it has started, and what it reads, -1
# before it does.
_PROCESS, _RECORD = 0, 1
_FIELDS = 2

_own: np.ndarray | None = None  # the row of this process, if it is a worker


def join(file: str, worker: int) -> None:
  """Makes this process worker number `worker` of the watchdog whose file that is."""
  global _own
  _own = np.memmap(file, np.int64, 'r+').reshape(-1, _FIELDS)[worker]
  _own[_PROCESS] = os.getpid()


def reading(record: int) -> None:
  """Says that this worker now reads and decodes that record; nothing where it is no worker."""
  if _own is not None:
    _own[_RECORD] = record


class Watchdog:
  """Kills the worker that the run has waited for too long; a context manager.

  Attributes:
    file: for `join`.
    hung: (number of the worker, record it was reading or -1), or None while all is well.
  """

  def __init__(self, workers: int, timeout_s: float):
    """Watches `workers` processes; the run waits up to timeout_s seconds for each element."""
    descriptor, self.file = tempfile.mkstemp(prefix='dpcap-workers-')
    os.close(descriptor)
    self.hung: tuple[int, int] | None = None
    self._rows = np.memmap(self.file, np.int64, 'w+', shape=(workers, _FIELDS))
    self._rows[:, _RECORD] = -1
    self._timeout_s = timeout_s
    self._before = {process.pid for process in multiprocessing.active_children()}
    self._waiting: tuple[float, int] | None = None  # since when, for which worker
    self._closed = threading.Event()

  def __enter__(self):
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

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._timeout_s / 4)):
      waiting = self._waiting
      if waiting and time.monotonic() - waiting[0] > self._timeout_s:
        process, record = self._rows[waiting[1]].tolist()
        self.hung = (waiting[1], record)
        # One that hangs before it could say which it is: any that has not said so.
        known = {*self._before, *self._rows[:, _PROCESS].tolist()}
        silent = [p.pid for p in multiprocessing.active_children() if p.pid not in known]
        for pid in [process] if process else silent:
          # Grain notices, and raises in the thread that waits.
          with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return
