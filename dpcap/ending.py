"""How a program ends that is interrupted, or whose reader went away: without a stack trace.

Programs import this before what takes seconds to import.
"""

import atexit
import os
import sys

# Exit status of a run that was asked to stop: what shells report for SIGTERM.
STOPPED = 143
# Of a process that lost another one of its run: start all again.
LOST = 75
# What shells report for SIGINT and SIGPIPE.
_INTERRUPTED, _NOBODY_READS = 130, 141


def _hook(kind, error, trace):
  if issubclass(kind, KeyboardInterrupt):
    _end('interrupted', _INTERRUPTED)
  if issubclass(kind, BrokenPipeError):
    _end(None, _NOBODY_READS)
  sys.__excepthook__(kind, error, trace)


def _end(line: str | None, status: int) -> None:
  try:
    if line:
      print(line, file=sys.stderr, flush=True)
  finally:
    # Not sys.exit: what is left to write would fail again.
    os._exit(status)


def _flush() -> None:
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    _end(None, _NOBODY_READS)


sys.excepthook = _hook
atexit.register(_flush)
