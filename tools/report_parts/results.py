"""Probes and other evaluations as tables and bars."""

from collections.abc import Sequence
from html import escape
from typing import Any

from tools.report_parts import probes
from tools.report_parts.run import Run

_LISTED_CLASSES = 12  # in a sentence
_DRAWN_CLASSES = 40  # a bar each


def section(run: Run) -> str:
  """HTML of all evaluations but the captions."""
  if not run.evals:
    return '<p class="absent">The run has not been evaluated yet: no evals/*.json.</p>'
  others = [
    f'{escape(probes.title(record))}: {escape(record["metric"])} {record["value"]:.1%}'
    f' of {record["n"]:,}'
    for record in run.evals.values()
    if 'features' not in record and 'captions' not in record
  ]
  also = f'<p class="about">Also measured: {"; ".join(others)}.</p>' if others else ''
  return ''.join(_probe_group(group) for group in probes.comparable(run)) + also


def _probe_group(group: Sequence[dict[str, Any]]) -> str:
  first = group[0]
  classes = first['classes']
  names = f' ({escape(", ".join(classes))})' if len(classes) <= _LISTED_CLASSES else ''
  rows = ''.join(_row(record) for record in group)
  drawn = group if len(classes) <= _DRAWN_CLASSES else ()
  return (
    f'<div class="group"><p class="verdict">{escape(probes.verdict(group))}</p><p class="about">'
    f'Linear probes: {len(classes)} classes{names}, {first["n_train"]:,} training and'
    f' {first["n"]:,} test images. Bars: top-1 accuracy; whiskers: 95% interval; dotted line:'
    f' chance.</p>'
    '<table class="probes"><thead><tr><th>probe</th><th>features</th>'
    '<th class="scale"><span>0</span><span>50</span><span>100%</span></th>'
    '<th class="n">top-1</th><th class="n">95% interval</th><th class="n">chance</th>'
    f'<th class="n">n</th></tr></thead><tbody>{rows}</tbody></table>'
    f'<div class="panels">{"".join(map(_by_class, drawn))}</div></div>'
  )


def _row(record: dict[str, Any]) -> str:
  classes, interval = len(record['classes']), record['interval95']
  return (
    f'<tr{_own(record)}><th>{escape(probes.title(record))}</th>'
    f'<td class="features">{record["features"]}</td>'
    f'<td class="bar">{_bar(record["value"], classes, interval)}</td>'
    f'<td class="n value">{record["value"]:.1%}</td>'
    f'<td class="n interval">{100 * interval[0]:.1f} – {100 * interval[1]:.1f}</td>'
    f'<td class="n chance">{1 / classes:.1%}</td><td class="n count">{record["n"]:,}</td></tr>'
  )


def _by_class(record: dict[str, Any]) -> str:
  rows = ''.join(
    f'<tr><th>{escape(name)}</th><td class="bar">{_bar(share, len(record["classes"]))}</td>'
    f'<td class="n">{share:.1%}</td></tr>'
    for name, share in record['per_class'].items()
  )
  return (
    f'<figure{_own(record)}><figcaption>{escape(probes.title(record))}'
    f' <span>by class</span></figcaption><table class="classes">{rows}</table></figure>'
  )


def _own(record: dict[str, Any]) -> str:
  return ' class="own"' if probes.is_own(record) else ''


def _bar(value: float, classes: int, interval: Sequence[float] = ()) -> str:
  """A bar from 0 to 1 with chance and whiskers, as an svg element."""
  x = lambda share: f'{share:.2%}'
  whiskers = ''
  if interval:
    low, high = map(x, interval)
    whiskers = (
      f'<line x1="{low}" x2="{high}" y1="9" y2="9"/>'
      f'<line x1="{low}" x2="{low}" y1="5.5" y2="12.5"/>'
      f'<line x1="{high}" x2="{high}" y1="5.5" y2="12.5"/>'
    )
  return (
    '<svg height="18"><rect class="track" width="100%" height="12" y="3" rx="2"/>'
    f'<rect class="fill" width="{x(value)}" height="12" y="3" rx="2"/>'
    f'<line class="dots" x1="{x(1 / classes)}" x2="{x(1 / classes)}" y1="0" y2="18"/>'
    f'{whiskers}</svg>'
  )
