"""The runs behind the tables: trained and evaluated once, in processes of their own."""

import hashlib
import json
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from dpcap import config as config_lib
from dpcap import privacy
from dpcap.training import build
from dpcap.training.workdir import publish_statement
from tools.reproduce_parts import scales
from tools.reproduce_parts.table import Measured, Row, unmeasured

REPOSITORY = pathlib.Path(__file__).parents[2]

# Exit status of who was asked to stop: what shells report for SIGTERM.
STOPPED = 143


class Study:
  """Runs of one scale in `workdir`/runs, each in a folder named by a digest of its config.

  So tables share them, and what was trained or evaluated before is not done again.

  Attributes:
    commands: what was started, or is to be started by whoever has the machines.
  """

  def __init__(self, scale: str, workdir: pathlib.Path, launch: str | None = None):
    """`launch` is the launcher that starts trainings at the scale 'paper', with its options."""
    self._scale, self._launch = scale, launch
    self._given, self._workdir = str(workdir), workdir.resolve()
    self._reasons: dict[str, str] = {}  # run -> why it has no value
    self._child: subprocess.Popen | None = None
    self._stopping = False
    self.commands: list[str] = []

  def prepare(self, rows: Sequence[Row]) -> None:
    """Trains and evaluates what the rows need and is not there; a failure is the rows' own.

    Raises:
      SystemExit: with status 143, if SIGTERM or SIGINT came; what is done is kept.
    """
    wanted: dict[str, dict[str, None]] = {}
    for row in rows:
      if row.evaluation:
        stage = scales.stage_of(self._scale, row.run)
        wanted |= {stage: wanted.get(stage, {})} if stage else {}
        wanted.setdefault(row.run, {})[row.evaluation] = None
    before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
      for number, (run, evaluations) in enumerate(wanted.items(), 1):
        self._say(f'[{number}/{len(wanted)}] {run}')
        self._train(run)
        self._evaluate(run, list(evaluations))
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def measure(self, row: Row) -> Measured:
    """The row with its value and interval, or why there is none."""
    measured = unmeasured(row) | {
      'run': scales.training_config(self._scale, row.run),
      'epsilon': self._epsilon(row.run) if row.trained else 0.0,
    }
    record = self._record(row.run, row.evaluation)
    if record is None:
      return measured | {'why': self._reasons.get(row.run, 'not run yet')}
    part = record if row.shots is None else record['shots'][str(row.shots)]
    low, high = part['interval95']
    found = {'value': part['value'], 'low': low, 'high': high}
    return measured | found | {key: record.get(key) for key in ('n', 'chance', 'layers')}

  def folder(self, run: str) -> pathlib.Path:
    """The workdir of a run."""
    config = scales.load(scales.training_config(self._scale, run))
    fixed = json.dumps(config_lib.fixed_part(config_lib.to_json(config)), sort_keys=True)
    return self._workdir / 'runs' / hashlib.sha256(fixed.encode()).hexdigest()[:12]

  def _train(self, run: str) -> None:
    config, folder = scales.training_config(self._scale, run), self.folder(run)
    config_lib.validate(scales.load(config))
    if self._statement(run).get('steps') == scales.load(config).train.steps:
      return
    arguments = [f'--config={config}', f'--workdir={folder}']
    stage = scales.stage_of(self._scale, run)
    if stage:
      arguments.append(f'--config.train.init={self.folder(stage)}')
      if stage in self._reasons and self._scale != 'paper':
        self._reasons[run] = f'{stage}, which it starts from: {self._reasons[stage]}'
        return
    if self._scale == 'paper':
      command = [*shlex.split(self._launch or 'python -m dpcap.train')]
      command += ['--', *arguments] if self._launch else arguments
      self._start(run, 'training', command, bool(self._launch))
    else:
      self._start(run, 'training', [sys.executable, '-m', 'dpcap.train', *arguments])

  def _evaluate(self, run: str, evaluations: list[str]) -> None:
    missing = [name for name in evaluations if self._record(run, name) is None]
    started = self._scale != 'paper'
    if not missing or (started and run in self._reasons):
      return
    python = sys.executable if started else 'python'
    for config in scales.evaluation_configs(self._scale, run, missing):
      arguments = [f'--config={config}', f'--workdir={self.folder(run)}']
      self._start(run, 'evaluation', [python, '-m', 'dpcap.evaluate', *arguments], started)

  def _start(self, run: str, what: str, command: list[str], started: bool = True) -> None:
    """Runs the command with its output shown, or only tells it."""
    told = shlex.join(['python' if part == sys.executable else part for part in command])
    told = told.replace(str(self._workdir), self._given)
    self.commands.append(told)
    self._say(f'  $ {told}')
    if not started:
      self._reasons[run] = 'not run: its commands are printed'
      return
    last = 'no word'
    if not self._stopping:
      self._child = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
      )
      for line in self._child.stdout:
        last = line.strip() or last
        self._say(f'    {line.rstrip()}')
      self._child.wait()
    if self._stopping or self._child.returncode == STOPPED:
      self._say('stopped; the same command goes on')
      sys.exit(STOPPED)
    if self._child.returncode:
      self._reasons[run] = f'{what} ended with status {self._child.returncode}: {last}'

  def _stop(self, number, frame):
    self._stopping = True
    if self._child and self._child.poll() is None:
      self._child.terminate()

  def _record(self, run: str, name: str) -> dict[str, Any] | None:
    """evals/NAME.json, if it is of the last step and of what the config says now."""
    (config,) = scales.evaluation_configs(self._scale, run, [name])
    config = scales.load(config)
    record = _read(self.folder(run) / 'evals' / f'{name}.json')
    asked = json.loads(config_lib.to_json(config))['evals'].get(name)
    if not record or asked is None:
      return None
    options = {key: value for key, value in asked.items() if key not in ('name', 'apart')}
    last = pathlib.Path(record['checkpoint']).name == str(config.train.steps)
    return record if last and record['options'] == options else None

  def _statement(self, run: str) -> dict[str, Any]:
    folder = self.folder(run)
    if folder.exists():
      publish_statement(folder)
    return _read(folder / 'privacy.json') or {}

  def _epsilon(self, run: str) -> float | None:
    """The tightest that the run's statement has, or that its config will have; None: infinite."""
    statement = self._statement(run)
    if statement:
      bounds = [bound for bound in statement['epsilon'].values() if bound is not None]
      return min(bounds) if statement['private'] and bounds else None
    return privacy.accounting.finite_or_none(self.plan(run).epsilon())

  def plan(self, run: str, scale: str | None = None) -> privacy.PrivacyPlan:
    """The privacy parameters of a run, from its config at the study's scale or the one given."""
    config = scales.load(scales.training_config(scale or self._scale, run))
    size = config.data.dataset_size or len(build.make_source(config, config.data.source))
    return build.make_plan(config, size)

  def _say(self, line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None
