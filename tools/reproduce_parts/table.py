"""What a table is made of: rows, what is measured of them, and findings about them."""

import dataclasses
from collections.abc import Callable
from typing import Any

# A row as it is written: see `Row` and `tools.reproduce`.
Measured = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure.

  Attributes:
    name: for people; with `group` it stands once in a table.
    run: the experiment that is trained, as 'dpcap:base,epsilon2' of configs/.
    evaluation: the entry of `evals` that gives the value; None: the run's accounting does.
    group: what rows are to be compared within, such as a data set.
    shots: of an evaluation by images per class, which one; None: the evaluation's own value.
    paper: the paper's figure, None where it is not known for certain.
    source: where that stands.
    trained: False for what reads no training data, such as raw pixels: its epsilon is 0.
  """

  name: str
  run: str
  evaluation: str | None = None
  group: str = ''
  shots: int | None = None
  paper: float | None = None
  source: str | None = None
  trained: bool = True


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a table shows: `holds` is None where the intervals do not decide, or a row is missing."""

  name: str
  holds: bool | None
  why: str


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the study.

  Attributes:
    title: for people.
    rows: scale -> its rows.
    findings: measured rows -> what they show.
    measure: (study, row) -> the measured row; None: `Study.measure`, by the row's evaluation.
    number: format of values.
  """

  title: str
  rows: Callable[[str], list[Row]]
  findings: Callable[[list[Measured]], list[Finding]]
  measure: Callable[[Any, Row], Measured] | None = None
  number: str = '.1%'


def unmeasured(row: Row) -> Measured:
  """All keys of a measured row, with what is known before it is measured."""
  own = {key: getattr(row, key) for key in ('name', 'group', 'paper', 'source', 'run', 'evaluation')}
  return own | dict.fromkeys(('value', 'low', 'high', 'epsilon', 'n', 'chance', 'layers', 'why'))


def find(rows: list[Measured], name: str, group: str | None = None) -> Measured:
  """The row of that name, in the first group or the one given."""
  return next(row for row in rows if row['name'] == name and group in (None, row['group']))


def above(name: str, better: Measured, worse: Measured) -> Finding:
  """Whether one row lies above another: its whole interval has to."""
  for row in (better, worse):
    if row['low'] is None:
      return Finding(name, None, f'{row["name"]} is not measured: {row["why"]}')
  told = f'{said(better)} against {said(worse)}'
  if better['low'] > worse['high']:
    return Finding(name, True, told)
  if better['high'] < worse['low']:
    return Finding(name, False, f'{told}: the other way round')
  return Finding(name, None, f'{told}: the intervals overlap')


def above_chance(name: str, row: Measured) -> Finding:
  """Whether a row lies above the chance level of its evaluation."""
  level = dict.fromkeys(('value', 'low', 'high'), row['chance'])
  return above(name, row, row | {'name': 'chance'} | level)


def all_of(name: str, findings: list[Finding]) -> Finding:
  """Whether all hold; one that fails decides, one that is open leaves it open."""
  verdicts = [finding.holds for finding in findings]
  holds = False if False in verdicts else None if None in verdicts else True
  return Finding(name, holds, '; '.join(finding.why for finding in findings))


def said(row: Measured) -> str:
  """Name, value and interval in words."""
  return f'{row["name"]} {row["value"]:.1%} ({row["low"]:.1%} to {row["high"]:.1%})'
