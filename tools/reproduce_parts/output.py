"""A measured table as Markdown, JSON and a picture."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib import figure, ticker

from tools.reproduce_parts.table import Finding, Measured

_INK, _ACCENT, _LINE = '#333333', '#2a6f97', '#cccccc'
_HOLDS = {True: 'shown', False: 'NOT shown', None: 'open'}


def as_json(
  table: str, scale: str, rows: Sequence[Measured], findings: Sequence[Finding]
) -> dict[str, Any]:
  """What the last line of tools.reproduce holds."""
  return {
    'table': table,
    'scale': scale,
    'rows': list(rows),
    'findings': [dataclasses.asdict(finding) for finding in findings],
  }


def write(
  folder: pathlib.Path, title: str, table: dict[str, Any], made: dict[str, Any], number: str
) -> None:
  """Writes TABLE.json, TABLE.md and TABLE.png; `number` is the format of values."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / table['table']
  path.with_suffix('.json').write_text(json.dumps(table | made, indent=2, allow_nan=False) + '\n')
  path.with_suffix('.md').write_text(markdown(title, table, made, number))
  draw(path.with_suffix('.png'), title, table['rows'], number)


def markdown(title: str, table: dict[str, Any], made: dict[str, Any], number: str) -> str:
  """The table, its findings and how it was made."""
  more = [key for key in _MORE if any(row.get(key) is not None for row in table['rows'])]
  head = ['', 'paper', 'measured', '95% interval', 'epsilon', *(_MORE[key][0] for key in more), 'n']
  lines = [f'# {title}', '', f'Scale: {table["scale"]}{_SCALES.get(table["scale"], "")}.', '']
  lines += [_line(head), _line(['---'] * len(head))]
  for row in table['rows']:
    between = '' if row['low'] is None else f'{row["low"]:{number}} to {row["high"]:{number}}'
    lines.append(
      _line(
        [
          ', '.join(filter(None, (row['name'], row['group']))),
          _cell(row['paper'], number),
          row['why'] or _cell(row['value'], number),
          between,
          'inf' if row['epsilon'] is None else f'{row["epsilon"]:.3g}',
          *(_cell(row.get(key), _MORE[key][1]) for key in more),
          _cell(row['n'], ','),
        ]
      )
    )
  if table['findings']:
    lines += ['', 'Findings:', '']
  lines += [f'- {f["name"]}: **{_HOLDS[f["holds"]]}**. {f["why"]}.' for f in table['findings']]
  sources = dict.fromkeys(row['source'] for row in table['rows'] if row['source'])
  lines += ['', f'The paper\'s figures: {"; ".join(sources) or "none is known for certain"}.']
  lines += [
    'Intervals are those of the test images alone: another run of the same config has other noise.'
  ] * any(row['low'] is not None for row in table['rows'])
  lines += ['', f'Commit {made["commit"]}; {made["machine"]}; {made["date"]}.', '']
  commands = made['commands']
  return '\n'.join(lines + (['```', *commands, '```', ''] if commands else []))


# What a reader must know of one.
_SCALES = {'smoke': ', which shows that all works: nothing is learnt'}

# Columns that some tables have: key of the row -> title, format.
_MORE = {
  'chance': ('chance', '.1%'),
  'layers': ('features', 's'),
  'noise_multiplier': ('sigma', '.4g'),
  'epsilon_rdp': ('epsilon (RDP)', '.3f'),
  'epsilon_pld': ('epsilon (PLD)', '.3f'),
  'target': ('epsilon meant', 'g'),
  'sigma_rdp': ('sigma for it (RDP)', '.4f'),
  'sigma_pld': ('sigma for it (PLD)', '.4f'),
  'noise_to_batch': ('sigma / batch', '.3g'),
}


def _line(cells: Sequence[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _cell(value: float | str | None, number: str) -> str:
  return '' if value is None else f'{value:{number}}'


def draw(path: pathlib.Path, title: str, rows: Sequence[Measured], number: str) -> None:
  """A dot with its interval for each row, dashes at chance, a cross for the paper's figure; a panel
  each group."""
  groups = list(dict.fromkeys(row['group'] for row in rows))
  drawing = figure.Figure((7, 0.9 + 0.28 * len(rows) + 0.5 * len(groups)), layout='constrained')
  heights = [sum(row['group'] == group for row in rows) for group in groups]
  panels = drawing.subplots(len(groups), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
  for axes, group in zip(panels, groups):
    own = [row for row in rows if row['group'] == group]
    for chance in {row['chance'] for row in own} - {None}:
      axes.axvline(chance, color=_INK, linewidth=0.8, linestyle='--')
    for place, row in enumerate(own):
      if row['low'] is not None:
        axes.plot([row['low'], row['high']], [place] * 2, color=_ACCENT, linewidth=2)
      if row['value'] is not None:
        axes.plot(row['value'], place, 'o', color=_ACCENT, markersize=5)
        axes.annotate(
          f'{row["value"]:{number}}', (row['value'], place), (0, 4), textcoords='offset points',
          ha='center', fontsize=7, color=_INK,
        )  # fmt: skip
      if row['paper'] is not None:
        axes.plot(row['paper'], place, 'x', color=_INK, markersize=5)
    axes.set_yticks(range(len(own)), [row['name'] for row in own], fontsize=8)
    axes.set_ylim(len(own) - 0.4, -0.6)
    axes.set_title(group, fontsize=8, loc='left', color=_INK)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:{number}}'))
    axes.tick_params(axis='x', labelsize=8)
    axes.grid(axis='x', color=_LINE, linewidth=0.6)
    axes.spines[['top', 'right', 'left']].set_visible(False)
  told = [
    '  --: chance' if any(row['chance'] is not None for row in rows) else '',
    '  x: the paper' if any(row['paper'] is not None for row in rows) else '',
  ]
  drawing.suptitle(title + ''.join(told), fontsize=9)
  drawing.savefig(path, dpi=150, metadata={'Software': None})
