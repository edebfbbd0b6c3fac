"""The benchmark for people: tables on stderr, since stdout is for programs."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench_parts.trace import Profile, Row, place, place_in_any_block, sum_rows

TOP = 15
_WIDTH = 130  # where nobody says how wide the screen is


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
  """Yields a function that shows what is being done, on terminals only."""
  with _console().status('') as shown:
    yield shown.update


def show_lines(lines: list[dict[str, Any]]) -> None:
  """The measurements of one combination, from the JSON lines."""
  first = lines[0]
  table = _table(
    '{size}, encoder of depth {depth}, {image_size} px, {text_length} tokens of {vocab:,}, '
    'batch {batch}, {dtype}, {device}'.format(**first),
    ('strategy',),
    ('ms', 'x plain', 'quartiles', 'images/s', 'temp MB', 'GFLOP', 'GFLOP/s', 'of a matmul'),
  )
  for line in lines:
    if line['error']:
      table.add_row(line['strategy'], line['error'])
      continue
    quartiles = line['ratio_quartiles']
    table.add_row(
      line['strategy'],
      f'{1e3 * line["median_s"]:,.1f}',
      _number(line['ratio_to_plain'], '.2f'),
      f'{quartiles[0]:.2f} – {quartiles[1]:.2f}' if quartiles else '',
      _number(line['images_per_s'], ',.1f'),
      _number(line['temp_mb'], ',.1f'),
      _number(line['flops_g'], ',.2f'),
      _number(line['gflops_per_s'], ',.0f'),
      _number(line['share_of_matmul'], '.0%'),
    )
  _console().print(table)


def show_profile(strategy: str, profile: Profile) -> None:
  """Where the time of a strategy goes: by kind, by place in the model, by operation."""
  rows, total = profile.rows, sum(row.ms for row in profile.rows)
  busy = total / profile.wall_ms
  _console().print(
    f'\n{strategy}: {profile.wall_ms:,.2f} ms a step while traced, '
    f'{busy:.2f} threads or streams busy on average.\n'
    'Below: their time and how often each operation runs, per step; GFLOP/s of one of them.'
  )
  for left, shown, labels in (
    (('kind of operation',), sum_rows(rows, lambda row: row.kind), lambda row: (row.kind,)),
    (
      (f'place in the model, top {TOP}', 'kind'),
      sum_rows(rows, place_in_any_block)[:TOP],
      lambda row: (row.name, row.kind),
    ),
    (
      (f'operation, top {TOP}', 'place', 'kind'),
      rows[:TOP],
      lambda row: (row.name, place(row), row.kind),
    ),
  ):
    _console().print(_profile_table(left, shown, labels, total))


def _profile_table(
  left: Iterable[str], rows: Iterable[Row], labels: Callable[[Row], tuple[str, ...]], total: float
) -> Table:
  table = _table('', left, ('ms', 'share', 'runs', 'GFLOP/s'))
  for row in rows:
    table.add_row(
      *labels(row),
      f'{row.ms:,.3f}',
      f'{row.ms / total:.1%}',
      f'{row.calls:,.0f}',
      f'{row.flops / row.ms / 1e6:,.0f}' if row.flops else '',
    )
  return table


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
  table = Table(title=title, title_justify='left')
  for column in left:
    table.add_column(column, overflow='fold')
  for column in right:
    table.add_column(column, justify='right', no_wrap=True)
  return table


def _number(value: float | None, spec: str) -> str:
  return '' if value is None else format(value, spec)


def _console() -> Console:
  return Console(
    stderr=True, width=None if sys.stderr.isatty() else _WIDTH, highlight=False, markup=False
  )
