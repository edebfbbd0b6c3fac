"""What a workdir says about its run."""

import json
import pathlib
from typing import Any, NamedTuple

import ml_collections

from dpcap import config as config_lib
from dpcap import privacy
from dpcap.errors import UserError
from dpcap.training import metrics
from dpcap.training.workdir import publish_statement


class Run(NamedTuple):
  """The files of a workdir.

  Attributes:
    config: config.json, validated.
    statement: privacy.json.
    metrics: lines of metrics.jsonl.
    diagnostics: lines of diagnostics.private.jsonl, empty if they were switched off.
    evals: name -> evals/NAME.json, empty before the first evaluation.
    evals_in_training: name -> records of evals/step_N/NAME.json with their 'step', in order.
  """

  config: ml_collections.ConfigDict
  statement: dict[str, Any]
  metrics: list[dict[str, Any]]
  diagnostics: list[dict[str, Any]]
  evals: dict[str, dict[str, Any]]
  evals_in_training: dict[str, list[dict[str, Any]]]

  def epsilon_text(self) -> str:
    """The guarantee in a few words."""
    if not self.statement['private']:
      return 'NO PRIVACY'
    own, composed = self.statement, self.with_start
    return _epsilon_text(own) + (f'; with its start {_epsilon_text(composed)}' if composed else '')

  @property
  def with_start(self) -> dict[str, Any] | None:
    """'epsilon' and 'delta' of all that stands behind the model; None: no more than the run's."""
    init = self.statement.get('init')
    return None if not init or privacy.is_generated(init['statement']) else init['composed']


def _epsilon_text(figures: dict[str, Any]) -> str:
  bounds = ', '.join(
    f'{"no finite bound" if value is None else f"{value:,.3f}"} by {name.upper()}'
    for name, value in figures['epsilon'].items()
  )
  return f'epsilon {bounds}; delta {figures["delta"]:.3g}'


def read_run(workdir: pathlib.Path) -> Run:
  """Reads a workdir; metrics, diagnostics and evaluations may be missing.

  Raises:
    UserError: if it is not the workdir of a run with a checkpoint, or a file is damaged.
  """
  config = ml_collections.ConfigDict(_read_json(workdir / 'config.json'))
  publish_statement(workdir)
  statement = _read_json(workdir / 'privacy.json')
  if 'origin' in statement:
    raise UserError(f'{workdir}: holds weights that were imported; a report is of a run')
  try:
    config_lib.validate(config)
  except UserError as e:
    raise UserError(f'{workdir / "config.json"}: {e}') from e
  return Run(
    config=config,
    statement=statement,
    metrics=_read_lines(workdir / metrics.METRICS),
    diagnostics=_read_lines(workdir / metrics.DIAGNOSTICS),
    evals={path.stem: _read_json(path) for path in sorted(workdir.glob('evals/*.json'))},
    evals_in_training=_read_evals_in_training(workdir),
  )


def _read_evals_in_training(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  found = {}
  for path in workdir.glob('evals/step_*/*.json'):
    step = path.parent.name.removeprefix('step_')
    if step.isdecimal():
      found.setdefault(path.stem, []).append(_read_json(path) | {'step': int(step)})
  by_step = lambda records: sorted(records, key=lambda record: record['step'])
  return {name: by_step(found[name]) for name in sorted(found)}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    tree = json.loads(path.read_text())
  except OSError as e:
    raise UserError(
      f'{path}: cannot be read ({e.strerror}); give the workdir of a run with a checkpoint'
    ) from e
  except ValueError as e:
    raise UserError(f'{path}: damaged, not JSON ({e})') from e
  if not isinstance(tree, dict):
    raise UserError(f'{path}: damaged, holds no JSON object')
  return tree


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return metrics.read_jsonl(path) if path.exists() else []
