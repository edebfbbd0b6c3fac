"""Evaluates a checkpoint.

    python -m dpcap.evaluate --config=configs/Y.py[:argument] --workdir=DIR [--config.checkpoint=DIR]

Runs what the section `evals` of the config names and writes DIR/evals/NAME.json each. The
checkpoint is the newest of the workdir, or the one that `checkpoint` names.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import pathlib
from typing import Any

import numpy as np
from absl import flags

from dpcap import command_line
from dpcap.errors import UserError
from dpcap.evals import table
from dpcap.training import processes
from dpcap.training.compilation_cache import keep_compiled_programs
from dpcap.training.evaluation import Evaluations
from dpcap.training.workdir import newest_checkpoint, publish_statement

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'The run; results go to its folder evals.')


def main() -> None:
  """Reads the config, evaluates, writes and shows the results."""
  config = command_line.load_config(_CONFIG)
  if not _WORKDIR.value:
    raise UserError('--workdir is missing; give the directory of the run')
  if not config.evals:
    raise UserError('the config has no evals; name at least one evaluator')
  processes.initialize()
  keep_compiled_programs()
  workdir = pathlib.Path(_WORKDIR.value)
  if processes.is_main():
    publish_statement(workdir)
  evaluations = Evaluations(config)
  folder = workdir / 'evals'
  with processes.end_together():
    checkpoint, variables = _restore(evaluations, config.checkpoint, workdir)
    results = evaluations.run(variables, str(checkpoint), folder, cache=folder / 'cache')
  if processes.is_main():
    table.show(results)


def _restore(
  evaluations: Evaluations, named: str | None, workdir: pathlib.Path
) -> tuple[pathlib.Path, Any]:
  """The checkpoint to evaluate and its variables.

  A run that goes on beside this may remove its newest checkpoint for a newer one, while it is read.
  """
  find = lambda: pathlib.Path(processes.from_main(lambda: str(find_checkpoint(named, workdir))))
  checkpoint = find()
  while True:
    error = None
    try:
      variables = evaluations.restore(checkpoint)
    except UserError as e:
      error = e
    if not processes.gather(np.array([error is not None])).any():
      return checkpoint, variables
    tried, checkpoint = checkpoint, find()
    if tried == checkpoint:
      raise error or UserError(f'{checkpoint}: another process cannot read it')


def find_checkpoint(named: str | None, workdir: pathlib.Path) -> pathlib.Path:
  """The checkpoint to evaluate: the one named, or the newest of the workdir.

  Raises:
    UserError: if there is none.
  """
  if named:
    path = pathlib.Path(named)
    if not path.is_dir() or not path.name.isdigit():
      raise UserError(
        f'checkpoint is {named}; it must be a directory such as WORKDIR/checkpoints/1000'
      )
    return path
  newest = newest_checkpoint(workdir)
  if newest is None:
    raise UserError(f'{workdir}/checkpoints: holds no checkpoint; train first')
  return newest


if __name__ == '__main__':
  command_line.run(main)
