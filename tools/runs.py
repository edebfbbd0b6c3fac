"""Runs behind a program's results: trained once, in processes of their own, shared and resumed."""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from dpcap import config as config_lib
from dpcap.ending import STOPPED
from dpcap.training.workdir import publish_statement

REPOSITORY = pathlib.Path(__file__).parents[1]


class Runs:
  """Runs in `workdir`/runs, each in a folder named by a digest of its config.

  So what was trained before, by whatever words and by whichever program, is not trained again.

  Attributes:
    commands: all that it takes, whether done before, started, or for others to start.
  """

  def __init__(self, workdir: pathlib.Path):
    self._given, self._workdir = str(workdir), workdir.resolve()
    self._child: subprocess.Popen | None = None
    self._stopping = False
    self.commands: list[str] = []

  def folder(self, config: ml_collections.ConfigDict) -> pathlib.Path:
    """The workdir of the run of a config."""
    fixed = json.dumps(config_lib.fixed_part(config_lib.to_json(config)), sort_keys=True)
    return self._workdir / 'runs' / hashlib.sha256(fixed.encode()).hexdigest()[:12]

  def statement(self, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The privacy statement of its newest checkpoint; empty if there is none."""
    folder = self.folder(config)
    if folder.exists():
      publish_statement(folder)
    return read_json(folder / 'privacy.json') or {}

  def is_trained(self, config: ml_collections.ConfigDict) -> bool:
    """Whether all its steps are done."""
    return self.statement(config).get('steps') == config.train.steps

  @contextlib.contextmanager
  def stoppable(self) -> Iterator[None]:
    """While SIGTERM and SIGINT stop what is running, and then this process."""
    before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def note(self, command: Sequence[str]) -> None:
    """Adds a command to `commands`, whether it is still to be started or not."""
    self.commands.append(shlex.join(command).replace(str(self._workdir), self._given))

  def start(self, what: str, command: Sequence[str], private: bool = False) -> str | None:
    """Runs a command with its output shown; 'python' is the one that runs this.

    Args:
      what: it is, for people.
      command: with its arguments.
      private: whether its output may tell of private data.

    Returns:
      Why it failed, for files that may be published: with the last line of the output, unless that
      is private. None if it did not.

    Raises:
      SystemExit: with status 143, if it was stopped; what is done is kept.
    """
    if command[0] == 'python':
      command = [sys.executable, *command[1:]]
    last = 'no word'
    if not self._stopping:
      self._child = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
      )
      for line in self._child.stdout:
        last = line.strip() or last
        say(f'    {line.rstrip()}')
      self._child.wait()
    if self._stopping or self._child.returncode == STOPPED:
      say('stopped; the same command goes on')
      sys.exit(STOPPED)
    if self._child.returncode:
      failed = f'{what} ended with status {self._child.returncode}'
      return failed if private else f'{failed}: {last}'
    return None

  def _stop(self, number, frame):
    self._stopping = True
    if self._child and self._child.poll() is None:
      self._child.terminate()


def load(config: str) -> ml_collections.ConfigDict:
  """The ConfigDict that a value of --config names."""
  file, _, argument = config.partition(':')
  module = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
  return module.get_config(argument) if argument else module.get_config()


def provenance(date: str, commands: Sequence[str]) -> dict[str, Any]:
  """What a result file says of its making."""
  describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
  answer = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True)
  return {
    'commit': answer.stdout.strip() or 'unknown',
    'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores',
    'date': date,
    'commands': list(commands),
  }


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """What a JSON file holds; None if it is not there, or damaged."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def say(line: str) -> None:
  """Tells the person who waits."""
  print(line, file=sys.stderr, flush=True)
