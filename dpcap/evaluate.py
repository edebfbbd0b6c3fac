"""Evaluates a checkpoint.

    python -m dpcap.evaluate --config=configs/Y.py[:argument] --workdir=DIR [--config.checkpoint=DIR]

Runs what the section `evals` of the config names and writes DIR/evals/NAME.json each. The
checkpoint is the newest of the workdir, or the one that `checkpoint` names.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import pathlib

from absl import flags

from dpcap import command_line
from dpcap.errors import UserError
from dpcap.evals import table
from dpcap.training import processes
from dpcap.training.compilation_cache import keep_compiled_programs
from dpcap.training.evaluation import Evaluations, restore
from dpcap.training.workdir import publish_statement

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
    checkpoint, variables = restore(evaluations, config.checkpoint, workdir)
    results = evaluations.run(variables, str(checkpoint), folder, cache=folder / 'cache')
  if processes.is_main():
    table.show(results)


if __name__ == '__main__':
  command_line.run(main)
