"""What the model wrote about images, beside the images."""

import base64
import difflib
import html
import io
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.training import build

_MAX_IMAGES = 48
_PIXELATED_BELOW = 96  # pixels a side: enlarged as they are, and PNG keeps them so


def section(config: ml_collections.ConfigDict, record: dict) -> str:
  """HTML of an evaluation by captions; without images if its source cannot be read."""
  entries = record['captions'][:_MAX_IMAGES]
  try:
    view = make_view(config, record)
    pictures = [picture(view(entry['index'])) for entry in entries]
    absent = ''
  except (UserError, OSError, BadRecord, LookupError) as e:
    pictures = [''] * len(entries)
    absent = f'<p class="absent">Without images: {html.escape(str(e))}.</p>'
  figures = []
  for entry, image in zip(entries, pictures):
    right = entry['written'] in (entry['given'], *entry.get('others', ()))
    own = entry['written'] if right else entry['given']
    written, given = mark_words(entry['written'], own)
    tick = '<span class="tick">✓</span> ' if right else ''
    figures.append(
      f'<figure>{image}<figcaption><p>{tick}{written or "<mark>nothing</mark>"}</p>'
      f'<p class="given">{given}</p></figcaption></figure>'
    )
  title = html.escape(record['name'].replace('_', ' ').capitalize())
  return (
    f'<section><h2>{title}</h2><p class="about">The caption that the model writes and, below it,'
    f" the source's own. <mark>Marked</mark>: not in the source's caption; <u>underlined</u>:"
    f' missed. The same as one of its own word by word: {record["value"]:.1%} of'
    f' {record["n"]:,}.</p>{absent}'
    f'<div class="captions">{"".join(figures)}</div></section>'
  )


def mark_words(written: str, given: str) -> tuple[str, str]:
  """Aligns two captions word by word.

  Args:
    written: the model's.
    given: the source's own.

  Returns:
    Both as HTML: the written one with wrong words in <mark>, the given one with the words
    that the model missed in <u>.
  """
  a, b = written.split(), given.split()
  marked_a, marked_b = [], []
  for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
    for marked, words, tag in ((marked_a, a[a0:a1], 'mark'), (marked_b, b[b0:b1], 'u')):
      text = html.escape(' '.join(words))
      if text:
        marked.append(text if kind == 'equal' else f'<{tag}>{text}</{tag}>')
  return ' '.join(marked_a), ' '.join(marked_b)


def image_uri(image: np.ndarray) -> str:
  """A data URI of a uint8 (H, W, 3) image: PNG if it is small, else JPEG."""
  file = io.BytesIO()
  kind = 'PNG' if len(image) < _PIXELATED_BELOW else 'JPEG'
  Image.fromarray(image).save(file, kind)
  return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def picture(view: np.ndarray) -> str:
  """An image as an element; a small one is enlarged as it is."""
  crisp = ' class="crisp"' if len(view) < _PIXELATED_BELOW else ''
  return f'<img{crisp} src="{image_uri(view)}" alt="">'


def open_source(config: ml_collections.ConfigDict, record: dict[str, Any]) -> data.Source:
  """The source that was evaluated.

  Raises:
    UserError: if it cannot be opened, or is another one by now: the record's numbers of images, and
      what it says of privacy, are of the one that was there.
  """
  source = build.make_source(config, record['options']['source'])
  if source.fingerprint not in record['fingerprints']:
    raise UserError('the images have changed since they were evaluated')
  return source


def make_view(
  config: ml_collections.ConfigDict, record: dict[str, Any]
) -> Callable[[int], np.ndarray]:
  """The function from a number in the source that was evaluated to what the model saw of it.

  It returns uint8 (H, W, 3), and raises BadRecord, OSError or LookupError of one that is gone.

  Raises:
    UserError: as `open_source`.
  """
  source = open_source(config, record)
  transform = data.Transform(config.data.image_size, config.data.text_length, tokenizer=None)
  return lambda number: transform.view(source[number]['image'])
