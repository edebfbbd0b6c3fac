"""Writes a page about a run: what was trained, how private it is, what its features are worth.

    python -m tools.report --workdir=DIR [--nodiagnostics]

DIR/report.html is one file that loads nothing else: images and plots are inside it. It shows
the run's private diagnostics, marked as such; --nodiagnostics leaves them out, for a page
that is to be published. The results are printed too.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
import datetime
import difflib
import html
import io
import json
import math
import pathlib
import re
import string
import tomllib
from typing import Any, NamedTuple
import warnings

from absl import flags
import jax
import matplotlib
from matplotlib import figure
from matplotlib import ticker
import ml_collections
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpcap import command_line
from dpcap import config as config_lib
from dpcap import data
from dpcap import models
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.training import build
from dpcap.training import metrics as metrics_lib

_MAX_CLASSES = 40  # in a chart with one bar a class
_MAX_CAPTIONS = 48  # images an evaluation
_MAX_CAPTION_CHARS = 200
_PIXELATED_BELOW = 96  # pixels a side: enlarged as they are, and PNG keeps them so

_STATEMENT_KEYS = (
    'private', 'epsilon', 'accountant', 'delta', 'noise_multiplier', 'clip_norm', 'steps',
    'dataset_size', 'expected_batch_size', 'sampling_probability', 'text', 'not_covered',
)


class Run(NamedTuple):
  """What a workdir says about its run.

  Attributes:
    workdir: where it lies.
    config: config.json.
    statement: privacy.json.
    metrics: lines of metrics.jsonl, empty without the file.
    diagnostics: lines of diagnostics.private.jsonl, empty without the file.
    evals: file stem -> evals/STEM.json.
  """

  workdir: pathlib.Path
  config: dict[str, Any]
  statement: dict[str, Any]
  metrics: list[dict[str, Any]]
  diagnostics: list[dict[str, Any]]
  evals: dict[str, dict[str, Any]]


class Probe(NamedTuple):
  """One top-1 accuracy; shares are in [0, 1], None where the file has no finite number."""

  name: str
  features: str
  value: float | None
  interval: tuple[float, float] | None
  classes: tuple[str, ...]
  n: float | None
  per_class: dict[str, float | None]

  @property
  def own(self) -> bool:
    """Whether it probes the model's own features."""
    return self.features == 'model'


def main() -> None:
  """Reads the run, writes the page, prints the results."""
  if not flags.FLAGS.workdir:
    raise UserError('--workdir is missing; give the directory of the run')
  write_report(pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.diagnostics)


def write_report(workdir: pathlib.Path, diagnostics: bool = True) -> None:
  """Writes workdir / 'report.html', prints the results and the page's path.

  Args:
    workdir: of a run.
    diagnostics: whether to show what lies outside the guarantee.

  Raises:
    UserError: if the workdir is not one, is damaged, or cannot be written.
  """
  run = read_run(workdir)
  if not diagnostics:
    run = run._replace(diagnostics=[])
  path = workdir / 'report.html'
  try:
    path.write_text(make_page(run, diagnostics), encoding='utf-8', errors='replace')
  except OSError as e:
    raise UserError(f'{path}: cannot be written ({e.strerror})') from e
  show(run)
  Console().print(str(path), markup=False, highlight=False, soft_wrap=True)


# What lies in a workdir.


def read_run(workdir: pathlib.Path) -> Run:
  """Reads a workdir; evaluations, metrics and diagnostics may be missing.

  Raises:
    UserError: if it is not the workdir of a run, or a file in it is damaged.
  """
  if not workdir.is_dir():
    raise UserError(f'{workdir}: no such directory; give the workdir of a run')
  config = _read_dict(workdir / 'config.json', 'this is not the workdir of a run')
  statement = _read_dict(workdir / 'privacy.json', 'it comes with the first checkpoint')
  missing = [key for key in _STATEMENT_KEYS if key not in statement]
  if missing or not isinstance(statement['epsilon'], dict):
    lacking = ', '.join(missing) or 'epsilon by accountant'
    raise UserError(f'{workdir / "privacy.json"}: damaged, it lacks {lacking}')
  for key in ('data.source.name', 'data.image_size', 'model.size', 'train.steps'):
    if _at(config, key) is None:
      raise UserError(f'{workdir / "config.json"}: damaged, it lacks {key}')
  return Run(
      workdir=workdir,
      config=config,
      statement=statement,
      metrics=_read_lines(workdir / metrics_lib.METRICS),
      diagnostics=_read_lines(workdir / metrics_lib.DIAGNOSTICS),
      evals={path.stem: _read_dict(path) for path in sorted(workdir.glob('evals/*.json'))},
  )


def probes(run: Run) -> list[list[Probe]]:
  """The top-1 accuracies, grouped by test set, the model's own first in each group."""
  groups = {}
  for stem, record in run.evals.items():
    if record.get('metric') != 'top1':
      continue
    interval = record.get('interval95')
    bounds = [finite(x) for x in interval] if isinstance(interval, list) else []
    per_class = record.get('per_class')
    per_class = per_class if isinstance(per_class, dict) else {}
    classes = record.get('classes')
    classes = classes if isinstance(classes, list) else list(per_class)
    probe = Probe(
        name=_title(record, stem),
        features=str(record.get('features', '')),
        value=finite(record.get('value')),
        interval=tuple(bounds) if len(bounds) == 2 and None not in bounds else None,
        classes=tuple(map(str, classes)),
        n=finite(record.get('n')),
        per_class={str(name): finite(value) for name, value in per_class.items()},
    )
    test = json.dumps(_at(run.config, f'evals.{stem}.test'), sort_keys=True)
    groups.setdefault((probe.classes, probe.n, test), []).append(probe)
  best_first = lambda probe: (not probe.own, -(probe.value or 0))
  ordered = [sorted(group, key=best_first) for group in groups.values()]
  return sorted(ordered, key=lambda group: not group[0].own)


def verdict(group: Sequence[Probe]) -> list[str]:
  """What the intervals say of each of the model's probes against the others, in sentences."""
  others = [probe for probe in group if not probe.own]
  sentences = []
  for own in (probe for probe in group if probe.own):
    if not others:
      sentences.append(f'{own.name}: there is no other probe on this test set to compare with.')
      continue
    if not own.interval or not all(other.interval for other in others):
      sentences.append(f'{own.name}: an interval is missing, so the probes are not compared.')
      continue
    low, high = own.interval
    best = max(others, key=lambda other: other.interval[1])
    if low > best.interval[1]:
      sentences.append(
          f'{own.name} is above every other probe: its interval starts at {percent(low)},'
          f' the highest of the others ({best.name}) ends at {percent(best.interval[1])}.'
      )
      continue
    ahead = [other for other in others if other.interval[0] > high]
    level = [other for other in others if other.interval[0] <= high and other.interval[1] >= low]
    parts = [f'{other.name} is better ({percent(other.value)})' for other in ahead]
    parts += [f'{other.name} cannot be told apart ({percent(other.value)})' for other in level]
    sentences.append(
        f'{own.name} ({percent(own.value)}) is not above every other probe, going by the 95%'
        f' intervals: {"; ".join(parts)}.'
    )
  return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _read_dict(path: pathlib.Path, missing: str = '') -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as e:
    raise UserError(f'{path}: missing; {missing}') from e
  except OSError as e:
    raise UserError(f'{path}: cannot be read ({e.strerror})') from e
  except (ValueError, RecursionError) as e:
    raise UserError(f'{path}: damaged, not JSON ({e})') from e
  if not isinstance(value, dict):
    raise UserError(f'{path}: damaged, not a JSON object')
  return value


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  try:
    lines = metrics_lib.read_jsonl(path)
  except OSError as e:
    raise UserError(f'{path}: cannot be read ({e.strerror})') from e
  except ValueError as e:
    raise UserError(f'{path}: damaged, not text ({e})') from e
  return [line for line in lines if isinstance(line, dict) and finite(line.get('step')) is not None]


def _at(tree: Any, path: str) -> Any:
  """What lies at 'a.b.c' of nested dicts, or None."""
  for key in path.split('.'):
    tree = tree.get(key) if isinstance(tree, dict) else None
  return tree


def _title(record: dict[str, Any], stem: str) -> str:
  return str(record.get('name') or stem).replace('_', ' ')


# Numbers as text.


def finite(value: Any) -> float | None:
  """The value as a float if it is a finite number, else None."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
    return None
  return float(value)


def number(value: Any, spec: str = ',g') -> str:
  """A number in a format, or a dash where there is none."""
  value = finite(value)
  return '–' if value is None else format(value, spec)


def percent(value: Any) -> str:
  """A share as a percentage with one decimal."""
  value = finite(value)
  return '–' if value is None else f'{100 * value:.1f}%'


def interval_text(interval: tuple[float, float] | None) -> str:
  """An interval of shares, in percent."""
  return f'{100 * interval[0]:.1f} – {100 * interval[1]:.1f}' if interval else ''


def _power_of_ten(value: Any) -> str:
  """HTML for a small number: 1e-06 becomes 10 to the power of -6."""
  value = finite(value)
  if not value or 1e-3 <= abs(value) < 1e4:
    return number(value)
  mantissa, exponent = f'{value:.2e}'.split('e')
  mantissa = mantissa.rstrip('0').rstrip('.')
  factor = '' if mantissa == '1' else f'{mantissa} × '
  return f'{factor}10<sup>{int(exponent)}</sup>'.replace('-', '−')


# Captions and images.


def mark_words(written: str, given: str) -> tuple[str, str]:
  """Aligns two captions word by word.

  Args:
    written: the model's.
    given: the source's own.

  Returns:
    Both as HTML: the written one with wrong words in <mark>, the given one with the words
    that the model missed in <u>.
  """
  a, b = given.split(), written.split()
  marked_a, marked_b = [], []
  matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
  for kind, a0, a1, b0, b1 in matcher.get_opcodes():
    for out, words, tag in ((marked_a, a[a0:a1], 'u'), (marked_b, b[b0:b1], 'mark')):
      text = html.escape(' '.join(words))
      if words:
        out.append(text if kind == 'equal' else f'<{tag}>{text}</{tag}>')
  return ' '.join(marked_b), ' '.join(marked_a)


def image_uri(image: np.ndarray) -> str:
  """A data URI of a uint8 (H, W, 3) image: PNG if it is small, else JPEG."""
  file = io.BytesIO()
  kind = 'PNG' if max(image.shape) < _PIXELATED_BELOW else 'JPEG'
  Image.fromarray(image).save(file, kind, quality=88)
  return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def _views(config: dict[str, Any], stem: str, indices: Sequence[Any]) -> list[np.ndarray | None]:
  """What the model saw of records of an evaluation's source; None where one cannot be read.

  Raises:
    UserError: if the source cannot be made.
  """
  section = _at(config, f'evals.{stem}.source')
  if not isinstance(section, dict):
    raise UserError(f'config.json has no evals.{stem}.source')
  size = config['data']['image_size']
  try:
    options = config_lib.source_config(**section).to_dict()
    source = data.make_source(image_size=size, **options)
  except (OSError, ImportError, TypeError) as e:
    raise UserError(str(e)) from e
  transform = data.Transform(size, 0, tokenizer=None)  # a view has no text
  views = []
  for index in indices:
    try:
      views.append(transform.view(source[index]['image']))
    except (BadRecord, LookupError, TypeError, OSError):
      views.append(None)
  return views


# Plots. Their colours stand for variables of the style sheet, so that a plot follows the
# page from light to dark.

_COLORS = {
    'ink': '#010101', 'muted': '#020202', 'line': '#030303', 'accent': '#040404',
    'other': '#050505', 'private': '#060606',
}
_TICKS = (1, 2, 2.5, 5, 10)  # an axis goes in steps of these, times a power of ten
_PLOT_STYLE = {
    'svg.fonttype': 'none',  # text stays text, in the font of the page
    'svg.hashsalt': 'dpcap',
    'text.parse_math': False,
    'font.size': 8,
    'text.color': _COLORS['ink'],
    'axes.edgecolor': _COLORS['line'],
    'axes.labelcolor': _COLORS['muted'],
    'axes.linewidth': 0.8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.spines.left': False,
    'axes.axisbelow': True,
    'grid.color': _COLORS['line'],
    'grid.linewidth': 0.6,
    'xtick.color': _COLORS['muted'],
    'ytick.color': _COLORS['muted'],
    'xtick.major.size': 0,
    'ytick.major.size': 0,
}



class Curve(NamedTuple):
  """One panel: a key of metrics or diagnostics against the step."""

  key: str
  title: str
  unit: str
  spec: str  # how its last value is written
  top: float | None = None  # of the axis; None: as the values want it
  scale: float = 1.0  # of the values as shown


_PUBLIC_CURVES = (
    Curve('epsilon', 'Epsilon spent', 'epsilon', ',.3f'),
    Curve('learning_rate', 'Learning rate', 'learning rate', '.3g'),
    Curve('images_per_second', 'Throughput', 'images / s', ',.0f'),
)
_PRIVATE_CURVES = (
    Curve('loss', 'Loss', 'nats per token', ',.4f'),
    Curve('gradient_norm', 'Gradient norm', 'mean per example', ',.4g'),
    Curve('clip_fraction', 'Clipped examples', '% of the batch', '.1f', 105.0, 100.0),
)


def plot_curve(
    lines: Sequence[dict[str, Any]], curve: Curve, color: str, target: float | None = None
) -> str | None:
  """A panel with its last value, as HTML; None if no value is a finite number.

  Args:
    lines: of metrics or diagnostics.
    curve: what to draw.
    color: key of the style sheet.
    target: where a dashed line goes.
  """
  nan = float('nan')
  steps = np.array([line['step'] for line in lines], float)
  values = np.array([finite(line.get(curve.key)) or 0.0 for line in lines])
  known = np.array([finite(line.get(curve.key)) is not None for line in lines], bool)
  if not known.any():
    return None
  values = np.where(known, values * curve.scale, nan)

  def draw(axes):
    axes.plot(
        steps, values, color=_COLORS[color], linewidth=1.5, solid_joinstyle='round', clip_on=False
    )
    # A value without neighbours has no line.
    padded = np.concatenate([[False], known, [False]])
    alone = known & ~padded[:-2] & ~padded[2:]
    axes.plot(steps[alone], values[alone], 'o', markersize=4, color=_COLORS[color], clip_on=False)
    if target is not None:
      axes.axhline(target, color=_COLORS['ink'], linewidth=0.9, linestyle=(0, (4, 3)))
      axes.annotate(
          f'target {target:g}', (1, target), xycoords=('axes fraction', 'data'),
          xytext=(0, 3), textcoords='offset points', ha='right', va='bottom',
      )
    tallest = max([float(np.nanmax(values)), target or 0.0])
    if float(np.nanmin(values)) >= 0 and curve.key != 'loss':
      axes.set_ylim(0, curve.top or (tallest * 1.16 or 1))
    axes.set_xlim(0, max(float(steps.max()), 1.0))
    axes.set_xlabel('step')
    axes.set_ylabel(curve.unit)
    axes.grid(axis='y')
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=_TICKS))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=_TICKS))
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(lambda x, _: f'{x:,.6g}')

  last = np.flatnonzero(known)[-1]
  text = format(values[last], curve.spec) + ('%' if curve.unit.startswith('%') else '')
  return _panel(
      curve.title, f'<b>{text}</b> at step {steps[last]:,.0f}', _svg(draw, 3.3, 1.95, curve.title)
  )


def plot_classes(probe: Probe) -> str:
  """A panel with a bar for each class, as HTML."""
  names = [name for name in probe.classes if name in probe.per_class] or list(probe.per_class)
  shares = [100 * (probe.per_class[name] or 0.0) for name in names]
  rows = np.arange(len(names))

  def draw(axes):
    color = _COLORS['accent' if probe.own else 'other']
    axes.barh(rows, shares, height=0.62, color=color)
    for row, name in zip(rows, names):
      value = probe.per_class[name]
      axes.annotate(
          '–' if value is None else f'{100 * value:.1f}', (shares[row], row), xytext=(3, 0),
          textcoords='offset points', va='center', fontsize=7, color=_COLORS['muted'],
      )
    axes.set_yticks(rows, [_shorten(name, 20) for name in names], color=_COLORS['ink'])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 113)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel('accuracy, %')
    axes.grid(axis='x')
    if len(probe.classes):
      axes.axvline(
          100 / len(probe.classes), color=_COLORS['muted'], linewidth=0.9, linestyle=(0, (1.5, 2))
      )
    axes.spines['bottom'].set_visible(False)

  return _panel(
      probe.name, f'<b>{percent(probe.value)}</b> over all',
      _svg(draw, 3.3, 0.55 + 0.19 * len(names), f'accuracy by class: {probe.name}'),
  )


def _svg(draw: Callable[[Any], None], width: float, height: float, label: str) -> str:
  """What `draw` draws on axes of that size in inches, as an svg element."""
  file = io.StringIO()
  with matplotlib.rc_context(_PLOT_STYLE), warnings.catch_warnings():
    # It warns of glyphs that its own fonts lack, but the text is set in those of the page.
    warnings.simplefilter('ignore')
    drawing = figure.Figure((width, height), layout='constrained')
    drawing.patch.set_visible(False)
    axes = drawing.subplots()
    axes.patch.set_visible(False)
    draw(axes)
    empty = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    drawing.savefig(file, format='svg', metadata=empty)
  text = file.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r'<g id="[^"]*"', '<g', text)  # ids are for the whole page
  text = re.sub(r'font: ([\d.]+px) [^;"]*', r'font-size: \1', text)
  for name, color in _COLORS.items():
    text = text.replace(color, f'var(--{name})')
  view_box = re.search(r'viewBox="[^"]*"', text).group()
  opening = f'<svg role="img" aria-label="{html.escape(label)}" {view_box}>'
  return re.sub(r'<svg\b[^>]*>', lambda _: opening, text, count=1)


def _panel(title: str, note: str, svg: str) -> str:
  return (
      f'<figure class="panel"><figcaption><span>{html.escape(title)}</span>'
      f'<span class="note">{note}</span></figcaption>{svg}</figure>'
  )


def _shorten(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1].rstrip() + '…'


# The page.


def make_page(run: Run, diagnostics: bool = True) -> str:
  """The page as HTML.

  Args:
    run: what to show.
    diagnostics: False says that they were left out on purpose.
  """
  config, statement = run.config, run.statement
  title = f'DP-Cap, size {config["model"]["size"]}, on {config["data"]["source"]["name"]}'
  groups = probes(run)
  body = [
      _header(run, title),
      _privacy_section(statement),
      _results_section(run, groups),
      _training_section(run, diagnostics),
      *_caption_sections(run),
      _footer(run),
  ]
  return _PAGE.substitute(title=html.escape(title), style=_STYLE, body='\n'.join(body))


def _header(run: Run, title: str) -> str:
  badges = []
  if run.statement['private'] is True:
    badges.append('<span class="badge good">differentially private</span>')
  else:
    badges.append('<span class="badge bad">NO PRIVACY</span>')
  if run.diagnostics:
    badges.append('<span class="badge caution">shows private diagnostics</span>')
  return (
      f'<header><p class="kicker">Run report {" ".join(badges)}</p>'
      f'<h1>{html.escape(title)}</h1><p class="lead">{_what_was_trained(run)}</p></header>'
  )


def _what_was_trained(run: Run) -> str:
  """One paragraph, as HTML."""
  config, s = run.config, run.statement
  e = lambda value: html.escape(str(value))
  size, image_size = str(config['model']['size']), config['data']['image_size']
  parts = []
  count = _count_parameters(config)
  if count:
    parts.append(f'{count:,} parameters')
  if size in models.SIZES:
    shape = models.SIZES[size]
    parts.append(
        f'a ViT encoder of {shape.depth} layers and width {shape.width}, a text decoder of'
        f' {shape.decoder_depth} layers and width {shape.decoder_width}'
    )
  shape_text = f' ({"; ".join(parts)})' if parts else ''
  source = config['data']['source']
  place = source.get('dataset') or source.get('path')
  place = f', {e(_shorten(str(place), 120))}' if place else ''
  split = f', split {e(source["split"])}' if source.get('split') else ''
  steps, planned = finite(s['steps']), finite(config['train']['steps'])
  q = finite(s['sampling_probability'])
  epochs = number(None if q is None or steps is None else q * steps, ',.3g')
  of_planned = f' of {planned:,.0f} planned' if steps != planned and planned else ''
  how = 'with DP-SGD' if s['private'] is True else 'without a privacy guarantee'
  return (
      f'An image captioner of size {e(size)}{shape_text}, trained from scratch {how} on'
      f' {number(s["dataset_size"], ",.0f")} image–text pairs ({e(source["name"])}{place}{split})'
      f' at {e(image_size)} × {e(image_size)} pixels: {number(steps, ",.0f")} steps{of_planned},'
      f' expected batch {number(s["expected_batch_size"], ",.0f")},'
      f' sampling probability {number(q, ".4g")}, {epochs} epochs in all.'
  )


def _count_parameters(config: dict[str, Any]) -> int | None:
  """Trained parameters, from shapes alone; None if the model cannot be made here."""
  try:
    config = ml_collections.ConfigDict(config)
    config_lib.validate(config)
    model = build.make_model(config, build.make_tokenizer(config).vocab_size)
  except (ValueError, TypeError, LookupError, OSError):  # a config of another version, say
    return None
  size = config.data.image_size
  image = jax.ShapeDtypeStruct((size, size, 3), np.float32)
  tokens = jax.ShapeDtypeStruct((config.data.text_length,), np.int32)

  def init(image, tokens):
    keys = {'params': jax.random.key(0), 'frozen': jax.random.key(0)}
    return model.init(keys, image, tokens)['params']

  shapes = jax.tree.leaves(jax.eval_shape(init, image, tokens))
  return sum(math.prod(leaf.shape) for leaf in shapes)


def _privacy_section(statement: dict[str, Any]) -> str:
  s, private = statement, statement['private'] is True
  first = str(s['accountant'])
  names = sorted(s['epsilon'], key=lambda name: name != first)
  tiles = []
  if not private:
    tiles.append(('∞', 'epsilon', 'no guarantee'))
  for name in names if private else ():
    by = html.escape(str(name).upper())
    value = finite(s['epsilon'][name])
    note = f"by {by}, the run's accountant" if name == first else f'by {by}'
    if value is None:
      tiles.append(('∞', 'epsilon', f'{note}: no finite bound'))
    else:
      tiles.append((f'{value:,.3f}', 'epsilon', note))
  clipping = 'per example' if finite(s['clip_norm']) else 'nothing is clipped'
  size, delta = finite(s['dataset_size']), finite(s['delta'])
  one_of_n = size and delta and math.isclose(delta, 1 / size)
  tiles += [
      (_power_of_ten(s['delta']), 'delta', '1 / N' if one_of_n else ''),
      (number(s['noise_multiplier'], '.4g'), 'noise multiplier', 'standard deviation / C'),
      (number(s['clip_norm']), 'clip norm C', clipping),
  ]
  emphasis = iter([' first' if private else ' void'])
  cells = ''.join(
      f'<div class="tile{next(emphasis, "")}"><dt>{label}</dt><dd>{value}</dd><p>{note}</p></div>'
      for value, label, note in tiles
  )
  not_covered = s['not_covered'] if isinstance(s['not_covered'], list) else []
  items = ''.join(f'<li>{html.escape(str(item))}</li>' for item in not_covered)
  warning = '' if private else f'<p class="alarm">{html.escape(str(s["text"]))}</p>'
  return (
      f'<section><h2>Privacy</h2>{warning}<dl class="tiles">{cells}</dl>'
      f'<details><summary>The full statement, and what it does not cover</summary>'
      f'<p>{html.escape(str(s["text"]))}</p><h3>Not covered</h3><ul>{items}</ul>'
      '</details></section>'
  )


def _results_section(run: Run, groups: Sequence[Sequence[Probe]]) -> str:
  parts = ['<section><h2>What the features are worth</h2>']
  if not run.evals:
    parts.append('<p class="absent">The run has not been evaluated yet: no evals/*.json.</p>')
  elif not groups:
    parts.append('<p class="absent">No evaluation of this run reports a top-1 accuracy.</p>')
  for group in groups:
    rows = ''.join(_probe_row(probe) for probe in group)
    about = f'{len(group[0].classes)} classes' if group[0].classes else 'classes not listed'
    if 0 < len(group[0].classes) <= 12:
      about += f' ({html.escape(_shorten(", ".join(group[0].classes), 160))})'
    parts.append(''.join(f'<p class="verdict">{html.escape(s)}</p>' for s in verdict(group)))
    parts.append(
        f'<p class="about">Top-1 accuracy on {about}; whiskers: 95% interval;'
        f' dotted line: chance.</p>'
        '<table class="probes"><thead><tr><th>probe</th><th>features</th>'
        '<th class="scale"><span>0</span><span>50</span><span>100%</span></th>'
        '<th class="n">top-1</th><th class="n">95% interval</th><th class="n">chance</th>'
        f'<th class="n">n</th></tr></thead><tbody>{rows}</tbody></table>'
    )
  charts = [
      plot_classes(probe)
      for group in groups
      for probe in group
      if 0 < len(probe.per_class) <= _MAX_CLASSES
  ]
  if charts:
    parts.append(f'<h3>By class</h3><div class="panels">{"".join(charts)}</div>')
  others = {
      stem: record for stem, record in run.evals.items()
      if record.get('metric') != 'top1' and not _is_captions(record)
  }
  if others:
    rows = ''.join(
        f'<tr><th>{html.escape(_title(record, stem))}</th>'
        f'<td>{html.escape(str(record.get("metric", "")))}</td>'
        f'<td class="n">{number(record.get("value"), ".4g")}</td>'
        f'<td class="n">{number(record.get("n"), ",.0f")}</td></tr>'
        for stem, record in others.items()
    )
    parts.append(
        '<h3>Other evaluations</h3><table><thead><tr><th>evaluation</th><th>metric</th>'
        f'<th class="n">value</th><th class="n">n</th></tr></thead><tbody>{rows}</tbody></table>'
    )
  return ''.join(parts) + '</section>'


def _probe_row(probe: Probe) -> str:
  chance = 1 / len(probe.classes) if probe.classes else None
  emphasis = ' class="own"' if probe.own else ''
  return (
      f'<tr{emphasis}><th>{html.escape(probe.name)}</th>'
      f'<td class="features">{html.escape(probe.features)}</td>'
      f'<td class="bar">{_bar(probe, chance)}</td>'
      f'<td class="n value">{percent(probe.value)}</td>'
      f'<td class="n interval">{interval_text(probe.interval)}</td>'
      f'<td class="n chance">{percent(chance)}</td>'
      f'<td class="n count">{number(probe.n, ",.0f")}</td></tr>'
  )


def _bar(probe: Probe, chance: float | None) -> str:
  at = lambda share: f'{100 * min(max(share, 0.0), 1.0):.2f}%'
  marks = ['<rect class="track" width="100%" height="12" y="3" rx="2"/>']
  if probe.value is not None:
    marks.append(f'<rect class="fill" width="{at(probe.value)}" height="12" y="3" rx="2"/>')
  if chance is not None:
    marks.append(f'<line class="dots" x1="{at(chance)}" x2="{at(chance)}" y1="0" y2="18"/>')
  if probe.interval:
    low, high = map(at, probe.interval)
    marks.append(f'<line x1="{low}" x2="{high}" y1="9" y2="9"/>')
    marks += [f'<line x1="{x}" x2="{x}" y1="5.5" y2="12.5"/>' for x in (low, high)]
  return f'<svg height="18" role="img" aria-label="{percent(probe.value)}">{"".join(marks)}</svg>'


def _training_section(run: Run, diagnostics: bool) -> str:
  parts = ['<section><h2>Training</h2>']
  private = run.statement['private'] is True
  panels, words = [], []
  for curve in _PUBLIC_CURVES:
    target = None
    if curve.key == 'epsilon':
      if not private:
        words.append('There is no curve of epsilon, for the run has no guarantee.')
        continue
      target = finite(_at(run.config, 'privacy.epsilon'))
    panel = plot_curve(run.metrics, curve, 'accent', target)
    if panel:
      panels.append(panel)
    else:
      words.append(f'{curve.title}: {metrics_lib.METRICS} has no finite value.')
  parts.append(f'<div class="panels">{"".join(panels)}</div>')
  parts += [f'<p class="absent">{word}</p>' for word in words]

  drawn = [(curve, plot_curve(run.diagnostics, curve, 'private')) for curve in _PRIVATE_CURVES]
  if run.diagnostics:
    without = ', '.join(curve.title.lower() for curve, panel in drawn if not panel)
    missing = f' Not recorded: {without}.' if without else ''
    parts.append(
        '<div class="private"><p><strong>Private: do not publish.</strong> These diagnostics come'
        f' from the training data and lie outside the guarantee.{missing}</p>'
        f'<div class="panels">{"".join(panel for _, panel in drawn if panel)}</div></div>'
    )
  elif not diagnostics:
    parts.append(
        '<p class="absent">Loss, gradient norm and clip fraction are left out: they lie outside'
        ' the guarantee.</p>'
    )
  else:
    reason = 'diagnostics were switched off' if _at(run.config, 'train.diagnostics') is False else (
        f'{metrics_lib.DIAGNOSTICS} is missing or empty'
    )
    parts.append(f'<p class="absent">No loss, gradient norm and clip fraction: {reason}.</p>')
  return ''.join(parts) + '</section>'


def _is_captions(record: dict[str, Any]) -> bool:
  captions = record.get('captions')
  return isinstance(captions, list) and all(isinstance(entry, dict) for entry in captions)


def _caption_sections(run: Run) -> Iterable[str]:
  for stem, record in run.evals.items():
    if not _is_captions(record):
      continue
    entries = record['captions'][:_MAX_CAPTIONS]
    absent = ''
    try:
      views = _views(run.config, stem, [entry.get('index') for entry in entries])
    except UserError as e:
      views = [None] * len(entries)
      absent = f'<p class="absent">Without images: {html.escape(str(e))}.</p>'
    some = f' The first {len(entries)} are shown.' if len(entries) < len(record['captions']) else ''
    metric = html.escape(str(record.get('metric', '')).replace('_', ' ').capitalize())
    yield (
        f'<section><h2>{html.escape(_title(record, stem).capitalize())}</h2>'
        f'<p class="about">Held-out images, the caption that the model writes and, below it, the'
        f" source's own. <mark>Marked</mark>: not in the source's caption; <u>underlined</u>:"
        f' missed. {metric}: {percent(record.get("value"))} of'
        f' {number(record.get("n"), ",.0f")}.{some}</p>{absent}<div class="captions">'
        + ''.join(_caption_cell(entry, view, not absent) for entry, view in zip(entries, views))
        + '</div></section>'
    )


def _caption_cell(entry: dict[str, Any], view: np.ndarray | None, blank: bool) -> str:
  written, given = (
      _shorten(str(entry.get(key) or ''), _MAX_CAPTION_CHARS) for key in ('written', 'given')
  )
  written_html, given_html = mark_words(written, given)
  picture = '<div class="blank">no image</div>' if blank else ''
  if view is not None:
    crisp = ' class="crisp"' if max(view.shape) < _PIXELATED_BELOW else ''
    picture = f'<img{crisp} src="{image_uri(view)}" alt="{html.escape(given)}">'
  tick = '<span class="tick">✓</span> ' if written.split() == given.split() else ''
  return (
      f'<figure>{picture}<figcaption><p>{tick}{written_html or "<mark>nothing</mark>"}</p>'
      f'<p class="given">{given_html}</p></figcaption></figure>'
  )


def _footer(run: Run) -> str:
  checkpoints = sorted(
      {str(record['checkpoint']) for record in run.evals.values() if record.get('checkpoint')}
  )
  shown = ', '.join(_relative(path, run.workdir) for path in checkpoints)
  evaluated = f'Evaluated checkpoint: {html.escape(shown)}' if shown else 'No checkpoint evaluated'
  other = [path for path in checkpoints if pathlib.Path(path).name != str(run.statement['steps'])]
  if other:
    evaluated += f' (the privacy statement is of step {html.escape(str(run.statement["steps"]))})'
  now = datetime.datetime.now(datetime.timezone.utc)
  config = html.escape(json.dumps(run.config, indent=2))
  return (
      f'<footer><details><summary>config.json</summary><pre>{config}</pre></details>'
      f'<p>{evaluated}<span class="dot"> · </span>written {now:%Y-%m-%d %H:%M} UTC'
      f'<span class="dot"> · </span>dpcap {html.escape(version())}</p></footer>'
  )


def version() -> str:
  """dpcap's version, as pyproject.toml has it."""
  path = pathlib.Path(__file__).resolve().parents[1] / 'pyproject.toml'
  try:
    return tomllib.loads(path.read_text())['project']['version']
  except (OSError, KeyError, tomllib.TOMLDecodeError):
    return 'of unknown version'


def _relative(path: str, workdir: pathlib.Path) -> str:
  try:
    return str(pathlib.Path(path).resolve().relative_to(workdir.resolve()))
  except ValueError:
    return path


# The screen.


def show(run: Run) -> None:
  """Prints epsilon and the table of accuracies."""
  s, console = run.statement, Console()
  if s['private'] is True:
    bounds = ', '.join(
        f'{number(value, ",.3f") if finite(value) is not None else "no finite bound"} by'
        f' {str(name).upper()}'
        for name, value in s['epsilon'].items()
    )
    line = f'epsilon {bounds}; delta {number(s["delta"], ".3g")}'
  else:
    line = 'NO PRIVACY: epsilon is infinite'
  console.print(line, markup=False, highlight=False)
  for group in probes(run):
    table = Table()
    for column, justify in (
        ('probe', 'left'), ('features', 'left'), ('top-1', 'right'), ('95% interval', 'right'),
        ('chance', 'right'), ('n', 'right'),
    ):
      table.add_column(column, justify=justify)
    for probe in group:
      cells = (
          probe.name,
          probe.features,
          percent(probe.value),
          interval_text(probe.interval),
          percent(1 / len(probe.classes) if probe.classes else None),
          number(probe.n, ',.0f'),
      )
      table.add_row(*map(Text, cells), style='bold' if probe.own else None)
    console.print(table)
    for sentence in verdict(group):
      console.print(sentence, markup=False, highlight=False)
  if not run.evals:
    console.print('not evaluated yet', markup=False)


_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
</body>
</html>
""")

_STYLE = """
:root {
  --back: #fcfcfb; --card: #ffffff; --ink: #1b1d21; --muted: #626973; --line: #e2e4e3;
  --accent: #2458c7; --other: #a9b0ba; --private: #a8640c; --caution: #fdf3e2;
  --bad: #b3261e; --bad-back: #fce5e2; --good: #1c6b45; --good-back: #e2f3ea; --track: #f0f1f0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #131518; --card: #1a1d21; --ink: #e5e7ea; --muted: #9ba2ac; --line: #30343a;
    --accent: #7ba7f7; --other: #626b77; --private: #e0a95e; --caution: #2e2618;
    --bad: #ff9a90; --bad-back: #47211e; --good: #7fd3a8; --good-back: #19352a; --track: #24282d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 48px 32px 32px; max-width: 1120px; background: var(--back);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
p, dl, dd, figure, ul { margin: 0; }
h1 { margin: 10px 0 14px; font-size: 32px; line-height: 1.2; font-weight: 650;
  letter-spacing: -0.015em; }
h2 { margin: 0 0 18px; font-size: 20px; line-height: 1.3; font-weight: 650;
  letter-spacing: -0.005em; }
h3 { margin: 28px 0 12px; font-size: 15px; font-weight: 650; }
section { margin-top: 40px; padding-top: 24px; border-top: 1px solid var(--line); }
.kicker { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; color: var(--muted);
  font-size: 14px; }
.badge { padding: 1px 9px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); letter-spacing: 0.03em; }
.caution { color: var(--private); background: var(--caution); }
.lead { max-width: 76ch; color: var(--ink); }
.alarm { margin-bottom: 20px; padding: 10px 16px; border-left: 3px solid var(--bad);
  background: var(--bad-back); color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr));
  gap: 20px 24px; margin-bottom: 22px; }
.tile dt { color: var(--muted); font-size: 14px; }
.tile dd { font-size: 29px; line-height: 1.3; font-weight: 600; letter-spacing: -0.015em;
  white-space: nowrap; }
.tile.first dd { color: var(--accent); }
.tile.void dd { color: var(--bad); }
.tile p { color: var(--muted); font-size: 13px; }
sup { font-size: 0.6em; line-height: 0; }
details { font-size: 15px; }
details p, details ul, details h3 { max-width: 84ch; }
details h3 { margin: 14px 0 4px; }
summary { color: var(--accent); cursor: pointer; }
summary + * { margin-top: 10px; }
ul { padding-left: 20px; }
pre { overflow-x: auto; padding: 16px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
  "Liberation Mono", monospace; overflow-wrap: normal; }
.verdict { max-width: 76ch; margin-bottom: 10px; font-weight: 550; }
.about { max-width: 84ch; margin-bottom: 14px; color: var(--muted); font-size: 14px; }
.absent { margin-top: 12px; color: var(--muted); font-style: italic; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { padding: 9px 14px 9px 0; text-align: left; font-weight: 400; vertical-align: middle;
  border-bottom: 1px solid var(--line); }
table + .about, table + .verdict { margin-top: 32px; }
th:last-child, td:last-child { padding-right: 0; }
thead th { padding-top: 0; color: var(--muted); font-size: 13px; }
.n { text-align: right; white-space: nowrap; }
.probes th:first-child { min-width: 150px; }
.probes .bar, .probes .scale { width: 36%; }
.scale span { display: inline-block; width: 33.3%; text-align: center; }
.scale span:first-child { text-align: left; }
.scale span:last-child { text-align: right; }
.bar svg { display: block; width: 100%; overflow: visible; }
.track { fill: var(--track); }
.fill { fill: var(--other); }
.bar line { stroke: var(--ink); stroke-width: 1.5; }
.bar .dots { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 1.5 2.5; }
.features, .interval, .chance, .count { color: var(--muted); }
.own th, .own .value { font-weight: 650; }
.own .fill { fill: var(--accent); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
  gap: 24px 28px; }
.panel svg { display: block; width: 100%; height: auto; }
.panel figcaption { display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 0 12px; margin-bottom: 6px; font-size: 15px; font-weight: 600; }
.panel .note { color: var(--muted); font-size: 14px; font-weight: 400; }
.note b { color: var(--ink); font-weight: 600; }
.private { margin-top: 28px; padding: 16px 20px 18px; border: 1px solid var(--line);
  border-left: 3px solid var(--private); border-radius: 4px; background: var(--card); }
.private > p { margin-bottom: 16px; font-size: 15px; }
.private strong { color: var(--private); }
.private .panels { grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); }
mark { padding: 0 2px; border-radius: 2px; background: var(--bad-back); color: var(--bad); }
u { text-decoration: underline dotted; text-underline-offset: 3px; }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(152px, 1fr));
  gap: 26px 22px; }
.captions img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover;
  border-radius: 4px; }
.blank { display: grid; place-items: center; aspect-ratio: 1; border-radius: 4px;
  background: var(--track); color: var(--muted); font-size: 13px; }
.captions .crisp { image-rendering: pixelated; }
.captions figcaption { margin-top: 8px; font-size: 14px; line-height: 1.45; }
.given { margin-top: 5px; color: var(--muted); font-size: 13px; }
.tick { color: var(--good); font-weight: 700; }
footer { margin-top: 48px; padding-top: 20px; border-top: 1px solid var(--line);
  color: var(--muted); font-size: 14px; }
footer details { margin-bottom: 12px; color: var(--ink); }
@media (max-width: 760px) {
  body { padding: 28px 18px 24px; }
  h1 { font-size: 26px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
  .tile dd { font-size: 25px; }
  .probes thead { display: none; }
  .probes, .probes tbody { display: block; }
  .probes tr { display: grid; grid-template-columns: 1.4fr 1fr 1fr; padding: 12px 0;
    border-bottom: 1px solid var(--line); font-size: 14px;
    grid-template-areas: "name name value" "bar bar bar" "interval chance count"; }
  .probes th, .probes td { padding: 0; border: 0; text-align: left; }
  .probes th { grid-area: name; font-size: 15px; }
  .probes .features { display: none; }
  .probes .bar { grid-area: bar; width: auto; padding: 5px 0; }
  .probes .value { grid-area: value; font-size: 15px; text-align: right; }
  .probes .interval { grid-area: interval; }
  .probes .chance { grid-area: chance; text-align: center; }
  .probes .count { grid-area: count; text-align: right; }
  .probes .interval:not(:empty)::before { content: "95%: "; }
  .probes .chance::before { content: "chance "; }
  .probes .count::before { content: "n "; }
  .captions { grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); gap: 22px 16px; }
  .private { padding: 14px 14px 16px; }
}
"""


if __name__ == '__main__':
  # Defined here: a program that imports this module may have flags of the same names.
  flags.DEFINE_string('workdir', None, 'The run; the page goes there too.')
  flags.DEFINE_bool(
      'diagnostics', True, 'Show what lies outside the guarantee; off for a page to publish.'
  )
  command_line.run(main)
