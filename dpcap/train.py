"""Trains a model privately.

    python -m dpcap.train --config=configs/X.py[:argument] --workdir=DIR [--config.key=value ...]

The same command resumes a run that was stopped or killed.
"""

import dpcap.ending  # noqa: I001  before what takes long

import pathlib
import sys

from absl import flags

from dpcap import command_line
from dpcap.errors import UserError
from dpcap.training import loop, processes
from dpcap.training.compilation_cache import keep_compiled_programs

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run lives; created if need be.')


def main() -> None:
  """Reads the config and trains; exit status 143 if the run was asked to stop."""
  config = command_line.load_config(_CONFIG)
  if not _WORKDIR.value:
    raise UserError('--workdir is missing; give the directory where the run lives')
  processes.initialize()
  keep_compiled_programs()
  if loop.train(config, pathlib.Path(_WORKDIR.value)) is None:
    sys.exit(dpcap.ending.STOPPED)


if __name__ == '__main__':
  command_line.run(main)
