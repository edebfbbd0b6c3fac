"""The runs behind the tables: trained and evaluated once, in processes of their own."""

import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import ml_collections

from dpcap import config as config_lib
from dpcap import privacy
from dpcap.training import build
from tools.reproduce_parts import scales
from tools.reproduce_parts.table import Measured, Row, unmeasured
from tools.runs import Runs, load, read_json, say


class Study:
  """Runs of one scale in `workdir`/runs, which tables share.

  What was trained or evaluated before is not done again.
  """

  def __init__(self, scale: str, workdir: pathlib.Path, launch: str | None = None):
    """`launch` is the launcher that starts trainings at the scale 'paper', with its options."""
    self._scale, self._launch = scale, launch
    self._runs = Runs(workdir)
    self._reasons: dict[str, str] = {}  # run -> why it has no value

  @property
  def commands(self) -> list[str]:
    """All that the rows take, whether done before, started, or for others to start."""
    return self._runs.commands

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
    with self._runs.stoppable():
      for number, (run, evaluations) in enumerate(wanted.items(), 1):
        say(f'[{number}/{len(wanted)}] {run}')
        self._train(run)
        self._evaluate(run, list(evaluations))

  def measure(self, row: Row) -> Measured:
    """The row with its value and interval, or why there is none."""
    measured = unmeasured(row) | {
      'run': scales.training_config(self._scale, row.run),
      'epsilon': self._epsilon(row.run) if row.trained else 0.0,
    }
    record = self._record(row.run, row.evaluation)
    if record is None:
      return measured | {'why': self._reasons.get(row.run, 'not run yet')}
    if record.get('uses_training_data') is not False:
      declare = f'--config.evals.{row.evaluation}.apart=True'
      return measured | {
        'why': f'private: its images may be training images; {declare} vouches that none is'
      }
    part = record if row.shots is None else record['shots'][str(row.shots)]
    low, high = part['interval95']
    found = {'value': part['value'], 'low': low, 'high': high}
    return measured | found | {key: record.get(key) for key in ('n', 'chance', 'layers')}

  def folder(self, run: str) -> pathlib.Path:
    """The workdir of a run."""
    return self._runs.folder(self._config(run))

  def _train(self, run: str) -> None:
    config = self._config(run)
    config_lib.validate(config)
    arguments = [
      f'--config={scales.training_config(self._scale, run)}',
      f'--workdir={self.folder(run)}',
    ]
    stage = scales.stage_of(self._scale, run)
    if stage:
      arguments.append(f'--config.train.init={self.folder(stage)}')
    command = ['python', '-m', 'dpcap.train', *arguments]
    if self._launch:
      command = [*shlex.split(self._launch), '--', *arguments]
    self._runs.note(command)
    if self._runs.is_trained(config):
      return
    if stage in self._reasons and self._scale != 'paper':
      self._reasons[run] = f'{stage}, which it starts from: {self._reasons[stage]}'
      return
    self._start(run, 'training', command, self._scale != 'paper' or bool(self._launch))

  def _evaluate(self, run: str, evaluations: list[str]) -> None:
    for config, names in scales.evaluation_configs(self._scale, run, evaluations).items():
      arguments = [f'--config={config}', f'--workdir={self.folder(run)}']
      command = ['python', '-m', 'dpcap.evaluate', *arguments]
      self._runs.note(command)
      if all(self._record(run, name) for name in names):
        continue
      if self._scale == 'paper' or run not in self._reasons:
        self._start(run, 'evaluation', command, self._scale != 'paper')

  def _start(self, run: str, what: str, command: list[str], started: bool) -> None:
    """Runs the command, or only tells it; a failure is the run's own."""
    say(f'  $ {self.commands[-1]}')
    failed = 'not run: its commands are printed'
    if started:
      # The data of the other scales are generated.
      failed = self._runs.start(what, command, private=self._scale == 'paper')
    if failed:
      self._reasons.setdefault(run, failed)

  def _record(self, run: str, name: str) -> dict[str, Any] | None:
    """evals/NAME.json, if it is of the last step and of what the config says now."""
    (config,) = scales.evaluation_configs(self._scale, run, [name])
    config = load(config)
    record = read_json(self.folder(run) / 'evals' / f'{name}.json')
    asked = json.loads(config_lib.to_json(config))['evals'].get(name)
    if not record or asked is None:
      return None
    options = {key: value for key, value in asked.items() if key not in ('name', 'apart')}
    last = pathlib.Path(record['checkpoint']).name == str(config.train.steps)
    return record if last and record['options'] == options else None

  def _epsilon(self, run: str) -> float | None:
    """The tightest that the run's statement has, or that its config will have; None: infinite."""
    statement = self._runs.statement(self._config(run))
    if statement:
      bounds = [bound for bound in statement['epsilon'].values() if bound is not None]
      return min(bounds) if statement['private'] and bounds else None
    return privacy.accounting.finite_or_none(self.plan(run).epsilon())

  def plan(self, run: str, scale: str | None = None) -> privacy.PrivacyPlan:
    """The privacy parameters of a run, from its config at the study's scale or the one given."""
    config = load(scales.training_config(scale or self._scale, run))
    size = config.data.dataset_size or len(build.make_source(config, config.data.source))
    return build.make_plan(config, size)

  def _config(self, run: str) -> ml_collections.ConfigDict:
    return load(scales.training_config(self._scale, run))
