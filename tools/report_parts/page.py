"""The pages: a template, page.html, and the HTML that goes into its slots."""

import datetime
import functools
import math
import pathlib
import string
from collections.abc import Iterator
from html import escape
from typing import Any

import jax
import ml_collections
import optax

from dpcap import config as config_lib
from dpcap import models
from dpcap.errors import UserError
from dpcap.training import build
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.step import init_state
from tools.report_parts import caption_retrieval, captions, class_map, results, retrieval
from tools.report_parts.plots import Curve, panel
from tools.report_parts.run import Run

_TEMPLATE = pathlib.Path(__file__).with_name('page.html')

_EPSILON = Curve('epsilon', 'Epsilon spent', 'epsilon', ',.3f', 'accent')
_METRICS = (
  Curve('learning_rate', 'Learning rate', 'learning rate', '.3g', 'accent'),
  Curve('images_per_second', 'Throughput', 'images / s', ',.0f', 'accent'),
)
_DIAGNOSTICS = (
  Curve('loss', 'Loss', '', ',.4f', 'private'),
  Curve('gradient_norm', 'Gradient norm', 'mean per example', ',.4g', 'private'),
  Curve('clip_fraction', 'Clipped examples', 'share of the batch', '.1%', 'private'),
)

# What a result has -> what draws it.
_PICTURES = {
  'captions': captions.section,
  'image_to_text': caption_retrieval.section,
  'mean_average_precision': retrieval.section,
  'map': class_map.section,
}


def make_pages(run: Run) -> dict[str, str]:
  """File name -> HTML: the public page and, if there are diagnostics, the private one."""
  run_public = run._replace(
    evals={name: record for name, record in run.evals.items() if _is_public(record)},
    evals_in_training={
      name: records
      for name, records in run.evals_in_training.items()
      if all(map(_is_public, records))
    },
  )
  template = string.Template(_TEMPLATE.read_text(encoding='utf-8'))
  pages = {'report.html': template.substitute(_slots(run_public), badge='', diagnostics=_LEFT_OUT)}
  if run.diagnostics or run_public != run:
    pages['report.private.html'] = template.substitute(
      _slots(run),
      badge=_PRIVATE_BADGE,
      diagnostics=_diagnostics(run) if run.diagnostics else _LEFT_OUT,
    )
  return pages


def _is_public(record: dict[str, Any]) -> bool:
  """Whether a result is marked as one that the training data had no part in, but by the model.

  One that does not say why it is apart is of a version that compared configs, not records.
  """
  return record.get('uses_training_data') is False and 'apart' in record


def _name(run: Run) -> str:
  m = run.config.model
  return f'{m.name}, size {m.size}' if 'size' in m else m.name


def _slots(run: Run) -> dict[str, str]:
  return {
    'title': f'{_name(run)} on {run.config.data.source.name}',
    'guarantee': _guarantee_badge(run),
    'lead': _what_was_trained(run),
    **_privacy(run),
    'results': results.section(run),
    'training': _training(run),
    'pictures': ''.join(
      section(run.config, record)
      for key, section in _PICTURES.items()
      for record in run.evals.values()
      if key in record
    ),
    'config': escape(config_lib.to_json(run.config)),
    'colophon': _colophon(run),
  }


_LEFT_OUT = (
  '<p class="absent">Loss, gradient norms and clip fraction are not on this page: they come'
  ' from the training data and lie outside the guarantee.</p>'
)
_PRIVATE_BADGE = '<span class="badge caution">shows private diagnostics</span>'


def _guarantee_badge(run: Run) -> str:
  if run.statement['private']:
    return '<span class="badge good">differentially private</span>'
  return '<span class="badge bad">NO PRIVACY</span>'


def _what_was_trained(run: Run) -> str:
  c, s = run.config, run.statement
  source = c.data.source
  place = [source[key] for key in ('name', 'dataset', 'path', 'split') if source.get(key)]
  planned = '' if s['steps'] == c.train.steps else f' of {c.train.steps:,} planned'
  return (
    f'{_model(c)} trained {"with DP-SGD" if s["private"] else "without a guarantee"}'
    f' on {s["dataset_size"]:,} records ({escape(", ".join(place))}; {s["unit"]} each) at'
    f' {c.data.image_size} × {c.data.image_size} pixels: {s["steps"]:,} steps{planned}, expected'
    f' batch {s["expected_batch_size"]:,}, sampling probability {s["sampling_probability"]:.4g},'
    f' {s["sampling_probability"] * s["steps"]:.3g} epochs in all.'
  )


def _model(config: ml_collections.ConfigDict) -> str:
  """The model in words, and its parameters."""
  about = build.make_model(config, vocab_size=1).about()
  about = escape(about[0].upper() + about[1:])
  try:
    vocabulary = build.make_tokenizer(config).vocab_size
  except UserError:  # its file is on the machine that trained
    return about
  model = build.make_model(config, vocabulary)
  shapes = build.make_transform(config, tokenizer=None).shapes
  init = functools.partial(init_state, model, optax.identity(), Layout(make_mesh()), shapes, 0)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init).params))
  return f'{about} of {count:,} parameters'


def _privacy(run: Run) -> dict[str, str]:
  s, tiles = run.statement, []
  if s['private']:
    for name, value in sorted(s['epsilon'].items(), key=lambda item: item[0] != s['accountant']):
      note = f'by {name.upper()}' + (", the run's accountant" if name == s['accountant'] else '')
      if value is None:
        tiles.append(('epsilon', '∞', f'{note}: no finite bound'))
      else:
        tiles.append(('epsilon', f'{value:,.3f}', note))
  else:
    tiles.append(('epsilon', '∞', 'no guarantee'))
  for label, bounds in _other_bounds(run):
    for name, value in bounds.items():
      if value is not None:
        tiles.append((label, f'{value:,.3f}', f'epsilon by {name.upper()}'))
  mantissa, exponent = f'{s["delta"]:.2e}'.split('e')
  delta = f'{float(mantissa):g} × 10<sup>{int(exponent)}</sup>'.replace('-', '−')
  tiles.append(('delta', delta, '1 / N' if math.isclose(s['delta'] * s['dataset_size'], 1) else ''))
  if s['noise_multiplier']:
    tiles.append(('noise multiplier', f'{s["noise_multiplier"]:.4g}', 'standard deviation / C'))
  if s['clip_norm']:
    tiles.append(('clip norm C', f'{s["clip_norm"]:g}', 'per example'))
  return {
    'alarm': '' if s['private'] else f'<p class="alarm">{escape(s["text"])}</p>',
    'tiles': ''.join(
      f'<div><dt>{label}</dt><dd>{value}</dd><p>{note}</p></div>' for label, value, note in tiles
    ),
    'statement': escape(s['text']),
    'not_covered': ''.join(f'<li>{escape(item)}</li>' for item in s['not_covered']),
  }


def _other_bounds(run: Run) -> Iterator[tuple[str, dict[str, float | None]]]:
  """Whose they are, and by accountant."""
  s, composed = run.statement, run.with_start
  if s.get('simulates'):
    yield 'of the simulated run', s['simulates']['epsilon']
  if s.get('private_given_init') and not s['private']:
    yield 'given its start', s['epsilon']
  if s['private'] and composed:
    yield f'with its start, delta {composed["delta"]:.3g}', composed['epsilon']


def _training(run: Run) -> str:
  panels = [panel(run.metrics, curve) for curve in _METRICS]
  if run.statement['private']:
    panels.insert(0, panel(run.metrics, _EPSILON, run.config.privacy.epsilon))
  panels.append(results.in_training(run))
  return ''.join(panels) or '<p class="absent">metrics.jsonl has no finite value.</p>'


def _diagnostics(run: Run) -> str:
  units = {'loss': models.MODELS[run.config.model.name].LOSS_UNIT}
  curves = [curve._replace(unit=units.get(curve.key, curve.unit)) for curve in _DIAGNOSTICS]
  panels = ''.join(panel(run.diagnostics, curve) for curve in curves)
  return (
    '<div class="private"><p><strong>Private: do not publish.</strong> These diagnostics come'
    ' from the training data and lie outside the guarantee.</p>'
    f'<div class="panels">{panels}</div></div>'
  )


def _colophon(run: Run) -> str:
  steps = sorted({pathlib.Path(record['checkpoint']).name for record in run.evals.values()})
  evaluated = f', the evaluations of step {", ".join(steps)}' if steps else ''
  now = datetime.datetime.now(datetime.timezone.utc)
  return (
    f'The privacy statement is of step {run.statement["steps"]}{evaluated}.'
    f' Written {now:%Y-%m-%d %H:%M} UTC.'
  )
