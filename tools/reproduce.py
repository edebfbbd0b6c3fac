"""Makes a table of the paper's study: trains and evaluates what it needs, says what it shows.

    python -m tools.reproduce TABLE --scale=smoke|cpu|paper --workdir=DIR [--launch=COMMAND]

A table is a file of tools/tables/. The scale `cpu` trains the experiments scaled down to generated
scenes (configs/scenes.py), `smoke` the same in seconds, which shows that all works and nothing
else. `paper` is configs/dpcap.py and the like: it prints the commands, and with --launch starts the
trainings through a launcher (--launch='launch/slurm.sh --nodes=4 --gpus_per_node=8'); results that
are there are read. SIGTERM stops with status 143, and the same command goes on: runs and
evaluations that are done, also by other tables, are not done again. A row that fails has no value
and says why; nor has one whose images are not known, or declared, to be apart from the training
data: tables can be published.

DIR/TABLE.md, .json and .png hold the table; DIR/runs the runs. The last line on stdout is JSON:
{"table", "scale", "rows": [{"name", "group", "paper", "source", "value", "low", "high" (95%),
"epsilon" (null: infinite), "n", "chance", "layers", "run", "evaluation", "why"}], "findings":
[{"name", "holds" (true, false or null), "why"}]}.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import datetime
import json
import pathlib
import sys

from absl import logging

from dpcap.errors import UserError
from tools.arguments import Parser, program
from tools.reproduce_parts import output, scales
from tools.reproduce_parts.study import Study
from tools.runs import provenance
from tools.tables import TABLES


@program
def main(argv: list[str] | None) -> None:
  """Makes the table that the arguments name."""
  options = parse(argv)
  made = make(options.table, options.scale, options.workdir, options.launch)
  print(json.dumps(made, allow_nan=False), flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The checked arguments.

  Raises:
    UserError: naming the one that is wrong, and what is allowed.
  """
  parser = Parser('tools.reproduce', __doc__)
  parser.add_argument('table', choices=TABLES)
  parser.add_argument('--scale', choices=scales.SCALES, required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--launch', help="a launcher with its options, for scale 'paper'")
  options = parser.parse_args(argv)
  if options.launch and options.scale != 'paper':
    raise UserError(f"--launch is {options.launch!r}; it goes with --scale=paper only")
  return options


def make(name: str, scale: str, workdir: pathlib.Path, launch: str | None = None) -> dict:
  """Measures a table, writes its files and returns what the last line says."""
  table = TABLES[name]
  study = Study(scale, workdir, launch)
  rows = table.rows(scale)
  study.prepare(rows)
  measured = [(table.measure or Study.measure)(study, row) for row in rows]
  made = output.as_json(name, scale, measured, table.findings(measured))
  now = f'{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC'
  about = provenance(now, study.commands)
  output.write(workdir, table.title, made, about, table.number)
  return made


if __name__ == '__main__':
  logging.set_verbosity(logging.ERROR)
  sys.exit(main())
