"""Starts the processes of a run on this machine, and all of them again when one is lost.

    python -m launch.local --processes=2 [options] -- --config=FILE --workdir=DIR [...]

What follows -- goes to dpcap.train. The main process writes to the terminal as always; lines of
the others go to stderr behind their number, as '[1] ...'.

SIGTERM, SIGINT and SIGHUP are passed on as one SIGTERM: the run saves and ends with status 143.
A second one kills. A run that ends otherwise, because a process was killed, lost another one or
got SIGTERM from elsewhere, is started again, after a pause that doubles each time; it goes on from
its last checkpoint. What the user got wrong (status 2) and failures of the program are final.

Exits with the status of the run; what killed a process counts as 128 + signal.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from dpcap.ending import LOST, STOPPED
from dpcap.errors import UserError

_WORTH_A_RESTART = (STOPPED, LOST, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT)

# The others notice a death within processes.HEARTBEAT_SECONDS, except while they still wait
# for each other to start.
_PATIENCE_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 60.0

# A program and what its environment has beyond ours; None removes a variable.
Process = tuple[list[str], dict[str, str | None]]


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, without the usage."""

  def error(self, message: str):
    raise UserError(message)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """The checked options, and the flags of dpcap.train.

  Raises:
    UserError: naming the option, its value and what is allowed.
  """
  parser = _Parser(
    prog='python -m launch.local',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--processes', type=int, required=True, help='how many')
  add('--devices_per_process', type=int, help='CPU devices of each, for trying things out')
  add('--gpus_per_process', type=int, help='GPUs of each; the first ones go to the main process')
  add('--restarts', type=int, default=10, help='how often at most all are started again')
  add('--dry_run', action='store_true', help='print what would be started, start nothing')
  end = argv.index('--') if '--' in argv else len(argv)
  options, flags = parser.parse_args(argv[:end]), argv[end + 1 :]
  for name, smallest in (
    ('processes', 1),
    ('devices_per_process', 1),
    ('gpus_per_process', 1),
    ('restarts', 0),
  ):
    value = getattr(options, name)
    if value is not None and value < smallest:
      raise UserError(f'--{name}={value} must be {smallest} or more')
  if options.devices_per_process and options.gpus_per_process:
    raise UserError('--devices_per_process is for CPUs, --gpus_per_process for GPUs; give one')
  for name in ('--config', '--workdir'):
    if not any(flag == name or flag.startswith(f'{name}=') for flag in flags):
      raise UserError(f'{name} is missing; flags of dpcap.train follow --')
  return options, flags


def processes(options: argparse.Namespace, flags: list[str]) -> list[Process]:
  """What is to be started, the main process first; on a port that is free now.

  Raises:
    UserError: if there are too few GPUs.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  return [
    (
      [sys.executable, '-m', 'dpcap.train', *flags],
      {
        'DPCAP_MULTIHOST': None,
        'JAX_COORDINATOR_ADDRESS': address,
        # Not all interfaces, which is the default: nobody else has business there.
        'JAX_COORDINATOR_BIND_ADDRESS': address,
        'JAX_NUM_PROCESSES': str(options.processes),
        'JAX_PROCESS_ID': str(i),
        **_devices(options, i),
      },
    )
    for i in range(options.processes)
  ]


def _devices(options: argparse.Namespace, index: int) -> dict[str, str]:
  """What gives process `index` its devices."""
  if count := options.devices_per_process:
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={count}'
    return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip()}
  if count := options.gpus_per_process:
    needed = options.processes * count
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    gpus = visible.split(',') if visible else [str(i) for i in range(needed)]
    if len(gpus) < needed:
      raise UserError(
        f'--gpus_per_process={count} takes {needed} GPUs, but CUDA_VISIBLE_DEVICES is {visible!r}'
      )
    return {'CUDA_VISIBLE_DEVICES': ','.join(gpus[index * count : (index + 1) * count])}
  return {}


def shell_line(process: Process) -> str:
  """The process as a line for a shell."""
  command, environment = process
  removed = [f'--unset={name}' for name, value in environment.items() if value is None]
  given = [f'{name}={value}' for name, value in environment.items() if value is not None]
  return shlex.join(['env', *removed, *given, *command])


def run_once(
  started: list[Process], requests: list[int], patience_s: float = _PATIENCE_SECONDS
) -> list[int]:
  """Runs the processes until all have ended; returns their statuses, -N for signal N.

  Args:
    started: the main process first.
    requests: grows by one with each signal to this program.
    patience_s: once one has failed, the others have so long to end before they are killed.
  """
  with contextlib.ExitStack() as stack:
    running = [_start(i, process, stack) for i, process in enumerate(started)]
    done, deadline = 0, None
    while None in [p.poll() for p in running]:
      if len(requests) > done:
        for p in running:
          p.send_signal(signal.SIGKILL if done else signal.SIGTERM)
        done = len(requests)
      if deadline is None and any(p.returncode for p in running):
        deadline = time.monotonic() + patience_s
      if deadline is not None and time.monotonic() > deadline:
        for p in running:
          p.kill()
      time.sleep(0.05)
    return [p.returncode for p in running]


def _start(index: int, process: Process, stack: contextlib.ExitStack) -> subprocess.Popen:
  command, changes = process
  environment = {k: v for k, v in (os.environ | changes).items() if v is not None}
  # A session of its own: Ctrl-C reaches only this program, which turns it into SIGTERM, the
  # one signal of which a process tells the others.
  settings = dict(env=environment, start_new_session=True)
  if index == 0:
    p = subprocess.Popen(command, **settings)
  else:
    p = subprocess.Popen(
      command,
      **settings,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
    )
    thread = threading.Thread(target=_pass_lines_on, args=(index, p.stdout), daemon=True)
    thread.start()
    # Whom the process started may hold its end of the pipe for longer than it lives.
    stack.callback(thread.join, 5.0)
  stack.callback(p.kill)
  return p


def _pass_lines_on(index: int, lines) -> None:
  for line in lines:
    print(f'[{index}] {line.rstrip()}', file=sys.stderr, flush=True)


def verdict(statuses: list[int], asked_to_stop: bool) -> int | None:
  """The exit status of a run whose processes ended so; None if it is to be started again."""
  failures = [status for status in statuses if status]
  # The others of a process that fails only say that they lost it.
  final = [status for status in failures if status not in _WORTH_A_RESTART]
  if final:
    return _as_shell(max(final))
  if not failures:
    return 0
  return _as_shell(failures[0]) if asked_to_stop else None


def _as_shell(status: int) -> int:
  return 128 - status if status < 0 else status


def keep_running(
  start: Callable[[], list[Process]],
  restarts: int,
  requests: list[int],
  first_pause_s: float = 1.0,
) -> int:
  """Runs what `start` names, again and again if need be; returns the exit status."""
  for attempt in range(restarts + 1):
    statuses = run_once(start(), requests)
    status = verdict(statuses, asked_to_stop=bool(requests))
    if status is not None:
      return status
    how = ', '.join(f'process {i}: {_words(s)}' for i, s in enumerate(statuses) if s)
    if attempt == restarts:
      _say(f'{how}; that was the last of {restarts} restarts')
      return _as_shell(next(s for s in statuses if s))
    pause = min(first_pause_s * 2**attempt, _LONGEST_PAUSE_SECONDS)
    _say(f'{how}; starting all again in {pause:g} s (restart {attempt + 1} of {restarts})')
    end = time.monotonic() + pause
    while time.monotonic() < end:
      if requests:
        return STOPPED
      time.sleep(0.05)


def _words(status: int) -> str:
  return signal.Signals(-status).name if status < 0 else f'status {status}'


def _say(line: str) -> None:
  print(f'launch: {line}', file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
  """Runs what the command line asks for; returns the exit status."""
  try:
    options, flags = parse(sys.argv[1:] if argv is None else argv)
    first = processes(options, flags)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  if options.dry_run:
    print('\n'.join(map(shell_line, first)))
    return 0
  requests = []
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: requests.append(number))
  return keep_running(lambda: processes(options, flags), options.restarts, requests)


if __name__ == '__main__':
  sys.exit(main())
