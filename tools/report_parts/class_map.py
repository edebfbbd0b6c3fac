"""The classes of a labelled source as a map: what the features hold alike is near."""

import html
from typing import Any

import ml_collections
import numpy as np

from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from tools.report_parts import captions, probes

_WIDTH, _HEIGHT, _MARGIN = 1056, 760, 8  # user units, pixels on a wide screen
_NAMED = 150  # classes with a name and a picture, those with the most images; others are dots
_COVERED = 0.1  # of the page by pictures, if they are neither too large nor too small
_SMALLEST, _LARGEST = 22, 44  # sides of a picture
_LETTER, _LINE = 6.3, 12  # width of a letter, height of a line
_LONGEST = 18  # letters of a name
_ROUNDS, _STEP = 400, 20  # of pushing apart, and how far a box goes in one


def section(config: ml_collections.ConfigDict, record: dict[str, Any]) -> str:
  """HTML of an evaluation with a map of its classes; names alone if its source cannot be read."""
  title = html.escape(probes.title(record).capitalize())
  classes = sorted(record['map'], key=lambda entry: -entry['count'])
  places = np.array([[entry['x'], entry['y']] for entry in classes], float)
  if not np.isfinite(places).all():
    absent = '<p class="absent">Without a map: the features are not finite.</p>'
    return f'<section><h2>{title}</h2>{absent}</section>'
  places, named = _to_page(places), classes[:_NAMED]
  try:
    view = captions.make_view(config, record)
    images = [captions.image_uri(view(entry['image'])) for entry in named]
    absent = ''
  except (UserError, OSError, BadRecord, LookupError) as e:
    images = [''] * len(named)
    absent = f'<p class="absent">Without images: {html.escape(str(e))}.</p>'
  x_share, y_share = record['variance_explained']
  return (
    f'<section><h2>{title}</h2><p class="about">The mean features of {len(classes)} classes'
    f' ({html.escape(probes.features(record))}) on the two axes along which they differ most, with'
    f' the image that is nearest to each mean. The axes hold {x_share:.0%} and {y_share:.0%} of the'
    f' variance between classes: what is far apart here is so, what is near may be near on these'
    f' axes only. Dots: the exact places, where pictures had to make room for each other. The class'
    f' mean that is nearest to an image, without the image, is that of its class for'
    f' {record["value"]:.1%} of {record["n"]:,}.</p>{absent}'
    f'<div class="map">{_draw(named, images, places)}</div></section>'
  )


def _to_page(points_Cx2: np.ndarray) -> np.ndarray:
  """Places in user units, the same scale on both axes, x to the right and y up."""
  low, high = points_Cx2.min(axis=0), points_Cx2.max(axis=0)
  room = np.array([_WIDTH - 2 * 60, _HEIGHT - 2 * 40])
  scale = np.min(room / np.maximum(high - low, 1e-12))
  return (points_Cx2 - (low + high) / 2) * scale * (1, -1) + (_WIDTH / 2, _HEIGHT / 2)


def _draw(named: list[dict[str, Any]], images: list[str], places_Cx2: np.ndarray) -> str:
  names = [_shorten(entry['name']) for entry in named]
  side = int(np.clip((_COVERED * _WIDTH * _HEIGHT / len(named)) ** 0.5, _SMALLEST, _LARGEST))
  heights = [_LINE + 2 + (side if image else 0) for image in images]
  widths = [max(side + 4, _LETTER * len(name) + 4) for name in names]
  sizes = np.array([widths, heights], float).T
  centres = spread(places_Cx2[: len(named)], sizes)
  lines = ''.join(
    f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'
    for (x0, y0), (x1, y1) in zip(places_Cx2, centres)
  )
  dots = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>' for x, y in places_Cx2)
  items = ''
  for name, image, entry, (x, y), (_, height) in zip(names, images, named, centres, sizes):
    top = y - height / 2
    title = f'<title>{html.escape(entry["name"])}, {entry["count"]:,} images</title>'
    element = ''
    if image:
      element = (
        f'<image href="{image}" x="{x - side / 2:.1f}" y="{top:.1f}" width="{side}"'
        f' height="{side}"/>'
      )
    place = f'x="{x:.1f}" y="{top + height - 4:.1f}"'
    items += f'<g>{title}{element}<text {place}>{html.escape(name)}</text></g>'
  top = np.min(centres - sizes / 2, axis=0)[1] - _MARGIN
  height = np.max(centres + sizes / 2, axis=0)[1] + _MARGIN - top
  return f'<svg viewBox="0 {top:.0f} {_WIDTH} {height:.0f}" role="img">{lines}{dots}{items}</svg>'


def _shorten(name: str) -> str:
  return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + '…'


def spread(places_Cx2: np.ndarray, sizes_Cx2: np.ndarray) -> np.ndarray:
  """Centres (C, 2) of boxes near their places, pushed apart until none covers another.

  All are inside of the page. Where there is no room for that, they overlap as little as a few
  hundred rounds of pushing achieve.
  """
  centres = places_Cx2.astype(float).copy()
  half = sizes_Cx2 / 2
  low, high = half + _MARGIN, np.array([_WIDTH, _HEIGHT]) - half - _MARGIN
  # Boxes at one place would never part: each begins a little aside, the same every time.
  angles = 2.4 * np.arange(len(centres))
  centres += 0.01 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  for _ in range(_ROUNDS):
    apart = centres[:, None] - centres[None]
    reach = half[:, None] + half[None]
    covered = reach - np.abs(apart)
    over = np.all(covered > 0, axis=2) & ~np.eye(len(centres), dtype=bool)
    if not over.any():
      break
    # Each goes half of the way along the axis on which, for their sizes, less is covered.
    along = np.argmin(covered / reach, axis=2)[..., None] == np.arange(2)
    push = np.where(over[..., None] & along, np.sign(apart) * covered / 2, 0)
    moved = np.clip(0.5 * push.sum(axis=1), -_STEP, _STEP)
    centres = np.clip(centres + moved, low, high)
  return centres
