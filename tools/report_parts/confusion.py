"""Which classes were taken for which."""

from html import escape
from typing import Any

import numpy as np

from tools.report_parts import probes
from tools.report_parts.captions import image_uri

_WRITTEN_OUT = 12  # classes; more are drawn as pixels
_ACCENT = (36, 88, 199)


def matrix(record: dict[str, Any]) -> str:
  """The confusion matrix of an evaluation that has one, as HTML; '' for others.

  A row is a class, its cells the shares of its images that were taken for each class.
  """
  if 'confusion' not in record:
    return ''
  counts, classes = np.array(record['confusion']), record['classes']
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  draw = _table if len(classes) <= _WRITTEN_OUT else _picture
  return (
    f'<figure><figcaption>{escape(probes.title(record))} <span>rows: class; columns: answer'
    f'</span></figcaption>{draw(shares, classes)}</figure>'
  )


def _table(shares: np.ndarray, classes: list[str]) -> str:
  head = ''.join(f'<th><span>{escape(name)}</span></th>' for name in classes)
  rows = ''.join(
    f'<tr><th>{escape(name)}</th>'
    + ''.join(f'<td style="--share:{x:.3f}">{100 * x:.0f}</td>' for x in row)
    + '</tr>'
    for name, row in zip(classes, shares)
  )
  return f'<table class="confusion"><tr><th></th>{head}</tr>{rows}</table>'


def _picture(shares: np.ndarray, classes: list[str]) -> str:
  white = np.full(3, 255.0)
  pixels = white + shares[..., None] * (np.array(_ACCENT) - white)
  scale = max(1, 320 // len(classes))
  pixels = pixels.round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
  return f'<img class="confusion" src="{image_uri(pixels)}" alt="{len(classes)} classes">'
