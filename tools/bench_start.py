"""Times what people wait for: from the command to the end of a run's first step.

    python -m tools.bench_start --config=configs/demo.py [--rounds=3]

Each round starts the run twice, in workdirs of their own that are removed afterwards: once with
nothing kept from before (no compiled programs, no calibration), once with what the first one
left. A run is stopped as soon as it has done one step.

Prints one JSON line per start:

  start       first or second
  round       from 1
  wall_s      seconds from the command to the first line of metrics.jsonl
  cpu_s       processor seconds until then, of the run and of its data workers
  told        what the run said it was doing, and when, in seconds

Exits 2 if an option is wrong or the run fails.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

from dpcap.errors import UserError
from tools.arguments import Parser, program

_TICKS = os.sysconf('SC_CLK_TCK')


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """The options, and those that are passed on to the run.

  Raises:
    UserError: naming the option, its value and what is allowed.
  """
  parser = Parser('tools.bench_start', __doc__)
  parser.add_argument('--config', required=True, help='the experiment')
  parser.add_argument('--rounds', default='3', help='first and second starts each')
  options, passed_on = parser.parse_known_args(argv)
  if not options.rounds.isdecimal() or not int(options.rounds):
    raise UserError(f'--rounds={options.rounds!r} must be a whole number of at least 1')
  for argument in passed_on:
    if not argument.startswith('--config.'):
      raise UserError(f'{argument!r} is no option; others than --config.KEY=VALUE are not passed on')
  return options, [f'--config={options.config}', *passed_on]


def time_start(arguments: list[str], folder: pathlib.Path, cache: pathlib.Path) -> dict:
  """Starts the run, stops it after its first step, and says what that took.

  Raises:
    UserError: if the run ends before.
  """
  environment = os.environ | {'XDG_CACHE_HOME': str(cache)}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  began = time.monotonic()
  run = subprocess.Popen(
    [sys.executable, '-m', 'dpcap.train', *arguments, f'--workdir={folder / "run"}'],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  told = []

  def listen():
    for line in run.stderr:
      told.append((round(time.monotonic() - began, 1), line.strip()[:100]))

  threading.Thread(target=listen, daemon=True).start()
  metrics = folder / 'run' / 'metrics.jsonl'
  spent = 0.0
  while not (metrics.exists() and metrics.read_text().count('\n')):
    if run.poll() is not None:
      raise UserError(f'the run ended with status {run.returncode}: {told[-1:] or "no word"}')
    spent = max(spent, _processor_seconds(run.pid))
    time.sleep(0.05)
  wall = time.monotonic() - began
  run.send_signal(signal.SIGTERM)
  run.wait()
  return {'wall_s': round(wall, 1), 'cpu_s': round(spent, 1), 'told': told}


def _processor_seconds(pid: int) -> float:
  """Of a process and its children that live."""
  ticks = 0
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      fields = stat.read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
      continue
    # The parent, then user and system time: fields 4, 14 and 15 of proc(5).
    if int(stat.parent.name) == pid or int(fields[1]) == pid:
      ticks += int(fields[11]) + int(fields[12])
  return ticks / _TICKS


@program
def main(argv: list[str] | None) -> None:
  """Times what the options name."""
  options, arguments = parse(argv)
  for number in range(1, int(options.rounds) + 1):
    with tempfile.TemporaryDirectory(prefix='dpcap-start-') as folder:
      folder = pathlib.Path(folder)
      for start in ('first', 'second'):
        (folder / start).mkdir()
        result = time_start(arguments, folder / start, folder / 'cache')
        print(json.dumps({'start': start, 'round': number} | result), flush=True)


if __name__ == '__main__':
  sys.exit(main())
