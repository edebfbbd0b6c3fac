"""Captions found for images, images found for captions, and how often the right ones were."""

import html
from collections.abc import Callable
from typing import Any

import ml_collections

from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from tools.report_parts import captions, probes

_RANKINGS = {
  'image_to_text': ('captions for an image', 'mean token loss'),
  'image_to_text_ratio': ('captions for an image', 'log-likelihood ratio to the mean over images'),
  'text_to_image': ('images for a caption', 'loss'),
}


def section(config: ml_collections.ConfigDict, record: dict[str, Any]) -> str:
  """HTML of an evaluation by caption retrieval; without images if its source cannot be read."""
  examples, absent = record['examples'], ''
  try:
    view = captions.make_view(config, record)
    picture = lambda number: captions.picture(view(number))
    by_image = ''.join(_of_image(entry, picture) for entry in examples['images'])
    by_caption = ''.join(_of_caption(entry, picture) for entry in examples['captions'])
  except (UserError, OSError, BadRecord, LookupError, TypeError) as e:
    absent = f'<p class="absent">Without images: {html.escape(str(e))}.</p>'
    by_image, by_caption = ''.join(_of_image(entry, _nothing) for entry in examples['images']), ''
  shown = (
    '<h3>Images for a caption</h3><p class="about">Framed: an image that has the caption.</p>'
    f'<div class="found_images">{by_caption}</div>'
  )
  title = html.escape(probes.title(record).capitalize())
  return (
    f'<section><h2>{title}</h2><p class="about">The share of images that find a caption of their'
    f' own, and of captions that find an image of theirs, among the first k of the gallery:'
    f' {record["n"]:,} images, {record["distinct_captions"]:,} different captions. The ratio takes'
    f' away how likely a caption is for images of the gallery on average.</p>'
    f'{_table(record)}{absent}<h3>Captions for an image</h3>'
    f'<div class="found_captions">{by_image}</div>{shown if by_caption else ""}</section>'
  )


def _table(record: dict[str, Any]) -> str:
  at = list(record['image_to_text'])
  head = ''.join(f'<th class="n">recall at {html.escape(k)}</th>' for k in at)
  rows = ''
  for name, (what, score) in _RANKINGS.items():
    cells = ''
    for k in at:
      entry = record[name][k]
      low, high = entry['interval95']
      between = f'{100 * low:.1f} – {100 * high:.1f}'
      cells += (
        f'<td class="n"><b>{entry["value"]:.1%}</b> <span>{between}</span>'
        f'<small>chance {entry["chance"]:.2%}</small></td>'
      )
    rows += f'<tr><th>{what}<small>by {score}</small></th>{cells}</tr>'
  return (
    f'<table class="recall"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
  )


def _of_image(entry: dict[str, Any], picture: Callable[[int], str]) -> str:
  given = ' · '.join(map(html.escape, entry['given']))
  lists = ''.join(
    f'<div><p class="given">by {label}</p><ol>' + ''.join(map(_answer, entry[name])) + '</ol></div>'
    for name, label in (('image_to_text', 'loss'), ('image_to_text_ratio', 'ratio'))
  )
  return f'<figure>{picture(entry["image"])}<div><p>{given}</p>{lists}</div></figure>'


def _answer(answer: dict[str, Any]) -> str:
  tick = ' <span class="tick">✓</span>' if answer['right'] else ''
  return f'<li>{html.escape(answer["found"])}{tick}</li>'


def _of_caption(entry: dict[str, Any], picture: Callable[[int], str]) -> str:
  found = ''.join(
    f'<span class="{"same" if answer["right"] else "other"}">{picture(answer["found"])}</span>'
    for answer in entry['text_to_image']
  )
  caption = html.escape(entry['caption'])
  return f'<figure><figcaption>{caption}</figcaption><div>{found}</div></figure>'


def _nothing(number: int) -> str:
  del number
  return ''
