"""Signals that ask a run to stop, which it heeds between two parts of a step."""

import contextlib
import signal
from collections.abc import Iterator

from dpcap.training import processes


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
  """A list that SIGTERM and SIGINT fill; a second SIGINT interrupts at once."""
  requests = []

  def request(number, frame):
    if requests and number == signal.SIGINT:
      signal.default_int_handler(number, frame)
    requests.append(number)

  # Where JAX passes SIGTERM on to all processes, it has its own handler.
  numbers = [signal.SIGINT, *([] if processes.notices_are_passed_on() else [signal.SIGTERM])]
  before = {number: signal.signal(number, request) for number in numbers}
  try:
    yield requests
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
