"""Probes and other evaluations as tables and bars."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tools.report_parts import confusion, probes
from tools.report_parts.plots import Curve, panel
from tools.report_parts.run import Run

_LISTED_CLASSES = 12  # in a sentence
_DRAWN_CLASSES = 40  # a bar each


def section(run: Run) -> str:
  """HTML of all evaluations but the captions themselves."""
  if not run.evals:
    return '<p class="absent">The run has no evaluation that this page may show.</p>'
  others = [record for record in run.evals.values() if not probes.is_probe(record)]
  groups = ''.join(_probe_group(group) for group in probes.comparable(run))
  return groups + _others(others) + _declared(run.evals.values())


def in_training(run: Run) -> str:
  """HTML of the evaluations that were run in the middle of training: a curve each."""
  panels = (
    panel(
      records,
      Curve(
        'value',
        escape(probes.title(records[0])),
        records[0]['metric'],
        '.1%',
        'accent',
        'interval95',
      ),
    )
    for records in run.evals_in_training.values()
  )
  latest = (records[-1] for records in run.evals_in_training.values())
  return ''.join(panels) + _declared(latest)


def _probe_group(group: Sequence[dict[str, Any]]) -> str:
  first = group[0]
  classes = first['classes']
  names = f' ({escape(", ".join(classes))})' if len(classes) <= _LISTED_CLASSES else ''
  chance = 1 / len(classes)
  rows = ''.join(
    _row(record, escape(probes.features(record)), chance, _own(record)) for record in group
  )
  drawn = group if len(classes) <= _DRAWN_CLASSES else ()
  return (
    f'<div class="group"><p class="verdict">{escape(probes.verdict(group))}</p><p class="about">'
    f'Linear probes: {len(classes)} classes{names}, {first["n_train"]:,} training and'
    f' {first["n"]:,} test images. Bars: top-1 accuracy; whiskers: 95% interval; dotted line:'
    f' chance.</p>{_table("probe", "features", rows)}'
    f'{_panels([*map(_by_class, drawn), *map(confusion.matrix, group)])}</div>'
  )


def _others(records: Sequence[dict[str, Any]]) -> str:
  """All that are not probes in one table, and what they took for what."""
  if not records:
    return ''
  rows = ''.join(
    _row(record, escape(_what(record)), record.get('chance'), _own(record)) for record in records
  )
  return (
    f'<div class="group"><p class="about">Other evaluations. Whiskers: 95% interval; dotted line:'
    f' chance.</p>{_table("evaluation", "metric", rows)}'
    f'{_panels([*map(_by_shots, records), *map(confusion.matrix, records)])}'
    f'{"".join(map(_note, records))}{"".join(map(_guarantee, records))}</div>'
  )


def _what(record: dict[str, Any]) -> str:
  metric = record['metric'].replace('_', ' ')
  return f'{metric}, {probes.features(record)}' if 'features' in record else metric


def _by_shots(record: dict[str, Any]) -> str:
  """Accuracy against images per class, where it was measured so; '' elsewhere."""
  if not isinstance(record.get('shots'), dict):
    return ''
  lines = [{'step': int(k), **entry} for k, entry in record['shots'].items()]
  title = escape(probes.title(record))
  shots = dict(interval='interval95', axis='images per class', place='with {:,} per class')
  return panel(lines, Curve('value', title, record['metric'], '.1%', 'accent', **shots))


def _note(record: dict[str, Any]) -> str:
  """What an evaluator says that a reader of its figure has to know."""
  if not record.get('note'):
    return ''
  title, note = escape(probes.title(record)), escape(str(record['note']))
  return f'<p class="about"><b>{title}.</b> {note}</p>'


def _guarantee(record: dict[str, Any]) -> str:
  """What an evaluation that trained privately says of its own guarantee."""
  if not isinstance(record.get('privacy'), dict):
    return ''
  return (
    f'<p class="about"><b>{escape(probes.title(record))}.</b>'
    f' {escape(str(record["privacy"].get("text", "")))}</p>'
  )


def _declared(records: Iterable[dict[str, Any]]) -> str:
  """Which results are public on somebody's word."""
  names = [
    probes.title(record)
    for record in records
    if record.get('apart', {}).get('declared') and not record['uses_training_data']
  ]
  if not names:
    return ''
  return (
    f'<p class="about">Declared by those who evaluated, not seen in the records: that none of the'
    f' training images was read for {escape(", ".join(names))}.</p>'
  )


def _panels(figures: Iterable[str]) -> str:
  return f'<div class="panels">{"".join(figures)}</div>'


def _table(first: str, second: str, rows: str) -> str:
  return (
    f'<table class="probes"><thead><tr><th>{first}</th><th>{second}</th>'
    '<th class="scale"><span>0</span><span>50</span><span>100%</span></th>'
    '<th class="n">value</th><th class="n">95% interval</th><th class="n">chance</th>'
    f'<th class="n">n</th></tr></thead><tbody>{rows}</tbody></table>'
  )


def _row(record: dict[str, Any], second: str, chance: float | None, attributes: str = '') -> str:
  interval = record.get('interval95')
  between = f'{100 * interval[0]:.1f} – {100 * interval[1]:.1f}' if interval else ''
  return (
    f'<tr{attributes}><th>{escape(probes.title(record))}</th>'
    f'<td class="features">{second}</td>'
    f'<td class="bar">{_bar(record["value"], chance, interval)}</td>'
    f'<td class="n value">{record["value"]:.1%}</td><td class="n interval">{between}</td>'
    f'<td class="n chance">{"" if chance is None else f"{chance:.1%}"}</td>'
    f'<td class="n count">{record["n"]:,}</td></tr>'
  )


def _by_class(record: dict[str, Any]) -> str:
  rows = ''.join(
    f'<tr><th>{escape(name)}</th><td class="bar">{_bar(share, 1 / len(record["classes"]))}</td>'
    f'<td class="n">{share:.1%}</td></tr>'
    for name, share in record['per_class'].items()
  )
  return (
    f'<figure{_own(record)}><figcaption>{escape(probes.title(record))}'
    f' <span>by class</span></figcaption><table class="classes">{rows}</table></figure>'
  )


def _own(record: dict[str, Any]) -> str:
  return ' class="own"' if probes.is_own(record) else ''


def _bar(value: float, chance: float | None, interval: Sequence[float] | None = None) -> str:
  """A bar from 0 to 1 with chance and whiskers, as an svg element."""
  x = lambda share: f'{share:.2%}'
  lines = ''
  if chance is not None:
    lines += f'<line class="dots" x1="{x(chance)}" x2="{x(chance)}" y1="0" y2="18"/>'
  if interval:
    low, high = map(x, interval)
    lines += (
      f'<line x1="{low}" x2="{high}" y1="9" y2="9"/>'
      f'<line x1="{low}" x2="{low}" y1="5.5" y2="12.5"/>'
      f'<line x1="{high}" x2="{high}" y1="5.5" y2="12.5"/>'
    )
  return (
    '<svg height="18"><rect class="track" width="100%" height="12" y="3" rx="2"/>'
    f'<rect class="fill" width="{x(value)}" height="12" y="3" rx="2"/>{lines}</svg>'
  )
