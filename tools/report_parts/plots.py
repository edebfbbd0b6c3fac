"""Curves as inline SVG."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure, ticker

# Stand-ins for the variables of the style sheet, so that a plot follows it to dark mode.
_COLORS = {
  'ink': '#010101',
  'muted': '#020202',
  'line': '#030303',
  'accent': '#040404',
  'private': '#050505',
}
_STYLE = {
  'svg.fonttype': 'none',  # text stays text, in the font of the page
  'svg.hashsalt': 'dpcap',  # the same page for the same run
  'font.size': 8,
  'text.color': _COLORS['ink'],
  'axes.edgecolor': _COLORS['line'],
  'axes.labelcolor': _COLORS['muted'],
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.spines.left': False,
  'axes.grid': True,
  'axes.grid.axis': 'y',
  'grid.color': _COLORS['line'],
  'grid.linewidth': 0.6,
  'xtick.color': _COLORS['muted'],
  'ytick.color': _COLORS['muted'],
  'xtick.major.size': 0,
  'ytick.major.size': 0,
}
_NO_METADATA = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
_TICKS = (1, 2, 2.5, 5, 10)  # an axis goes in these, times a power of ten
_FEW = 20  # values that get a dot each, so that one without neighbours shows


class Curve(NamedTuple):
  """A key of metrics or diagnostics, drawn against the step.

  Attributes:
    key: in the lines of the file.
    title: of the panel.
    unit: label of the axis.
    spec: format of a value.
    color: name in the style sheet.
    interval: key of (low, high), drawn as a band; None: none.
    axis: what 'step' of a line is.
    place: how the caption names one.
  """

  key: str
  title: str
  unit: str
  spec: str
  color: str
  interval: str | None = None
  axis: str = 'step'
  place: str = 'at step {:,}'


def panel(lines: Sequence[dict[str, Any]], curve: Curve, target: float | None = None) -> str:
  """A curve with its last value in the caption, as HTML; '' if no value is finite.

  Args:
    lines: of metrics or diagnostics.
    curve: what to draw.
    target: where a dashed line goes.
  """
  steps = np.array([line['step'] for line in lines])
  # What a run does not measure is absent, what it could not is None: both become NaN.
  values = np.array([line.get(curve.key) for line in lines], float)
  finite = np.isfinite(values)
  if not finite.any():
    return ''
  values[~finite] = np.nan
  color = _COLORS[curve.color]
  with matplotlib.rc_context(_STYLE):
    drawing = figure.Figure((3.3, 1.95), layout='constrained')
    axes = drawing.subplots()
    marker = '.' if finite.sum() <= _FEW else None
    axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, clip_on=False)
    if curve.interval:
      low, high = np.array([line.get(curve.interval) or (np.nan, np.nan) for line in lines]).T
      axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    if target is not None:
      axes.axhline(target, color=_COLORS['ink'], linewidth=0.9, linestyle='--')
      axes.annotate(
        f'target {target:g}',
        (1, target),
        xycoords=('axes fraction', 'data'),
        xytext=(0, 3),
        textcoords='offset points',
        ha='right',
        va='bottom',
      )
    axes.set(xlabel=curve.axis, ylabel=curve.unit)
    axes.set_xlim(0, steps.max())
    axes.set_ylim(0, 1.16 * max(np.nanmax(values), target or 0) or 1)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=_TICKS))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=_TICKS))
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.yaxis.set_major_formatter('{x:,.6g}')
    file = io.StringIO()
    drawing.savefig(file, format='svg', transparent=True, metadata=_NO_METADATA)
  svg = file.getvalue()
  svg = svg[svg.index('<svg') :]
  for name, placeholder in _COLORS.items():
    svg = svg.replace(placeholder, f'var(--{name})')
  last = np.flatnonzero(finite)[-1]
  return (
    f'<figure class="panel"><figcaption>{curve.title} <span><b>{values[last]:{curve.spec}}</b>'
    f' {curve.place.format(steps[last])}</span></figcaption>{svg}</figure>'
  )
