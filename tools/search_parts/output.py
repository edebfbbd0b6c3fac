"""What a search found as Markdown, JSON and a picture."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from tools.search_parts.law import Law, Reading

_INK, _LINE = '#333333', '#cccccc'


def write(folder: pathlib.Path, name: str, found: dict[str, Any], made: dict[str, Any]) -> None:
  """Writes NAME.json and NAME.md; `made` is of `tools.runs.provenance`."""
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(found | made, indent=2, allow_nan=False)
  (folder / f'{name}.json').write_text(text + '\n')
  lines = [f'# {found["title"]}', '']
  for part in (_runs, _law, _plans, _check, _sweep):
    lines += part(found)
  lines += [f'Commit {made["commit"]}; {made["machine"]}; {made["date"]}.', '']
  lines += ['```', *made['commands'], '```', ''] if made['commands'] else []
  (folder / f'{name}.md').write_text('\n'.join(lines))


def _runs(found):
  if not found.get('runs'):
    return []
  rows = [
    [run['size'], f'{run["ratio"]:.3g}', *([run['why'], '', ''] if run['why'] else _losses(run))]
    for run in found['runs']
  ]
  sampling = 'variance that is sampling, at most'
  head = ['size', 'sigma / B', 'loss at the end', 'by the law', sampling]
  return ['## Measured', '', *_table(head, rows), '']


def _losses(run):
  return [f'{run["loss"]:.4f}', f'{run["predicted"]:.4f}', f'{run["sampling_share"]:.0%}']


_PARAMETERS = (('E', 'floor'), ('A', 'scale'), ('b', 'decay'), ('C', 'noise'))


def _law(found):
  if not found.get('law'):
    return []
  law, errors = found['law'], found['errors']
  head = ['size', *(name for name, _ in _PARAMETERS)]
  rows = [[size, *(f'{law[key][size]:.3g}' for _, key in _PARAMETERS)] for size in law['scale']]
  middle = math.sqrt(math.prod(law['ratios']))
  return [
    '## Law',
    '',
    f'loss = E + A T^-b + C (r / {middle:.3g})^{law["noise_power"]:.3g}, r = sigma / B.',
    '',
    *_table(head, rows),
    '',
    f'Fitted to T from {law["steps"][0]:.0f} to {law["steps"][1]:.0f} and r from'
    f' {law["ratios"][0]:.3g} to {law["ratios"][1]:.3g}.',
    f'Relative error: {errors["fit"]:.1%} (largest {errors["fit_largest"]:.1%}) of what it was'
    f' fitted to, {errors["left_out"]:.1%} (largest {errors["left_out_largest"]:.1%}) of runs left'
    ' out.',
    '',
  ]


def _plans(found):
  if not found.get('plans'):
    return []
  budget = found['budget']
  head = ['size', 'batch', 'steps', 'sigma', 'sigma / B', 'operations', 'predicted loss', '']
  return [
    '## Plans',
    '',
    f'N {budget["dataset_size"]:,}, epsilon {budget["epsilon"]:g}, delta {budget["delta"]:.3g}, at'
    f' most {budget["compute"]:.3g} operations.',
    '',
    *_table(head, [_plan_cells(plan) for plan in found['plans']]),
    '',
    found['said'],
    '',
  ]


def _plan_cells(plan):
  outside = '' if plan['outside'] == 1 else f'{plan["outside"]:.2g}x outside of what was measured'
  return [
    plan['size'],
    f'{plan["batch"]:,}',
    f'{plan["steps"]:,}',
    f'{plan["noise_multiplier"]:.4f}',
    f'{plan["ratio"]:.3g}',
    f'{plan["compute"]:.3g}',
    f'{plan["loss"]:.4f}',
    outside,
  ]


def _check(found):
  if not found.get('check'):
    return []
  check = found['check']
  plan, epsilon = check['plan'], found['budget']['epsilon']
  return [
    '## A real run',
    '',
    f'Size {plan["size"]}, batch {plan["batch"]:,}, {plan["steps"]:,} steps at epsilon'
    f' {epsilon:g}: predicted {check["predicted"]:.4f}, measured {check["measured"]:.4f} at the end'
    f' ({check["error"]:+.1%}); along the run {check["error_along"]:.1%} (root mean square).',
    '',
  ]


def _sweep(found):
  if not found.get('sweep'):
    return []
  keys = list(found['sweep'][0]['values'])
  rows = [
    [*(str(row['values'][key]) for key in keys), row['why'] or f'{row["loss"]:.4f}']
    for row in found['sweep']
  ]
  return [
    f'Size {found["size"]}, sigma / B {found["ratio"]:.3g}, {found["steps"]:,} steps.',
    '',
    *_table([*keys, 'loss at the end'], rows),
    '',
  ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  return [f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *rows)]


def draw_law(path: pathlib.Path, law: Law, readings: Sequence[Reading]) -> None:
  """A panel for each size: dots as measured, a line by the law for each noise-to-batch ratio."""
  sizes = list(law.scale)
  ratios = sorted({reading.ratio for reading in readings})
  drawing = figure.Figure((1 + 3.2 * len(sizes), 3.2), layout='constrained')
  panels = drawing.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
  steps = np.geomspace(*law.steps, 50)
  for axes, size in zip(panels, sizes):
    for place, ratio in enumerate(ratios):
      own = [r for r in readings if (r.size, r.ratio) == (size, ratio)]
      color = f'C{place}'
      axes.plot([r.step for r in own], [r.loss for r in own], 'o', color=color, markersize=3)
      line = [law.loss(size, step, ratio) for step in steps]
      axes.plot(steps, line, color=color, linewidth=1, label=f'{ratio:.3g}')
    axes.set_title(size, fontsize=9, color=_INK)
    axes.set_xlabel('steps', fontsize=8)
    axes.loglog()
    axes.grid(color=_LINE, linewidth=0.6, which='both')
    axes.spines[['top', 'right']].set_visible(False)
  panels[0].set_ylabel('loss', fontsize=8)
  panels[-1].legend(title='sigma / B', fontsize=7, title_fontsize=7)
  drawing.savefig(path, dpi=150, metadata={'Software': None})


def draw_sweep(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """A dot for each choice of values that has a loss, the best at the top."""
  rows = [row for row in rows if row['loss'] is not None]
  drawing = figure.Figure((6, 1 + 0.28 * len(rows)), layout='constrained')
  axes = drawing.subplots()
  axes.plot([row['loss'] for row in rows], range(len(rows)), 'o', color='C0', markersize=5)
  told = [', '.join(f'{key}={value}' for key, value in row['values'].items()) for row in rows]
  axes.set_yticks(range(len(rows)), told, fontsize=8)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel('loss at the end', fontsize=8)
  axes.grid(axis='x', color=_LINE, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  drawing.savefig(path, dpi=150, metadata={'Software': None})
