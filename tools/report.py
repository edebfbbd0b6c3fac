"""Writes pages about a run: what was trained, how private it is, what its features are worth.

    python -m tools.report --workdir=DIR

DIR/report.html can be published. DIR/report.private.html, written if the run kept
diagnostics, shows them too: they come from the training data and lie outside the guarantee.
Both load nothing else: images and plots are inside. The results are printed as well.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import pathlib

from absl import flags

from dpcap import command_line, evals
from dpcap.errors import UserError
from dpcap.evals import table
from dpcap.training.workdir import write_whole
from tools.report_parts import page, probes
from tools.report_parts.run import Run, read_run


def main() -> None:
  """Reads the run, prints its results, writes the pages."""
  if not flags.FLAGS.workdir:
    raise UserError('--workdir is missing; give the directory of the run')
  write_report(pathlib.Path(flags.FLAGS.workdir))


def write_report(workdir: pathlib.Path) -> None:
  """Prints the results, writes the pages and prints their paths.

  Args:
    workdir: of a run.

  Raises:
    UserError: if the workdir is not one, is damaged, or cannot be written.
  """
  run = read_run(workdir)
  show(run)
  for name, text in page.make_pages(run).items():
    path = workdir / name
    try:
      write_whole(path, text)
    except OSError as e:
      raise UserError(f'{path}: cannot be written ({e.strerror})') from e
    print(path)


def show(run: Run) -> None:
  """Prints epsilon, the table of results and what the intervals say."""
  print(f'{run.epsilon_text()}; step {run.statement["steps"]:,}')
  if not run.evals:
    print('not evaluated yet')
    return
  table.show(
    {
      name: evals.Result(record['metric'], record['value'], record['n'], record)
      for name, record in run.evals.items()
    }
  )
  for group in probes.comparable(run):
    print(probes.verdict(group))


if __name__ == '__main__':
  # Defined here: a program that imports this module may have a flag of the same name.
  flags.DEFINE_string('workdir', None, 'The run; the pages go there too.')
  command_line.run(main)
