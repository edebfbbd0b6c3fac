"""From the JSON of a design set to JPEG pictures with their captions and label.

A picture is one record: an icon, with its name and those of its aliases as captions. Icons of a set
that come out as the same bytes are one record too.
"""

import collections
import hashlib
import io
import json
import pathlib
import re
from typing import Any, NamedTuple
from xml.parsers import expat

from PIL import Image

from dpcap import data
from dpcap.data.tar_index import write_whole
from dpcap.errors import UserError

CONCEPTS = tuple(pathlib.Path(data.__file__).with_name('icons_concepts.txt').read_text().split())

_QUALITY = 88
_LEAST_CONTRAST = 16  # of 255, between the darkest and the lightest pixel of a picture
_DEEPEST = 100  # elements in each other; the renderer's stack ends at a few hundred
_LONGEST = 2_000_000  # characters of an SVG
_INSIDE = re.compile(r'\s*(#|data:image/(png|jpe?g|gif|webp)[;,])')


class Record(NamedTuple):
  """A picture of a design set."""

  name: str  # of the icon
  captions: list[str]  # without repeats, the icon's own name first
  label: str | None  # the one concept that the captions hold
  size: int  # bytes of its JPEG
  digest: str  # of its JPEG


class Drawn(NamedTuple):
  """A design set: its records, in the order of their pictures in the file beside, and the rest."""

  records: list[Record]
  left_out: dict[str, int]  # icons by reason


def words(name: str) -> str:
  """The name of an icon as a caption: 'arrow-left_2' becomes 'arrow left 2'."""
  return ' '.join(re.split(r'[-_\s]+', name)).strip()


def label_of(captions: list[str]) -> str | None:
  """The concept that captions of a picture hold, if it is exactly one."""
  found = set(CONCEPTS).intersection(re.split('[^a-z]+', ' '.join(captions)))
  return found.pop() if len(found) == 1 else None


def draw_set(name: str, content: bytes, side: int, folder: pathlib.Path) -> Drawn:
  """Draws a design set into `folder`: NAME.jpgs, its pictures end to end, then NAME.json.

  Args:
    name: of the set.
    content: its JSON.
    side: of the pictures, in pixels.
    folder: where a set is done if its NAME.json is there.

  Raises:
    UserError: the JSON is not that of a design set.
    OSError: the files cannot be written.
  """
  try:
    icons = json.loads(content)
    captions = _captions(icons)
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f'PACKAGE: json/{name}.json is no design set ({error!r})') from error
  left_out = collections.Counter()
  left_out['hidden'] = len(icons['icons']) - len(captions)
  first: dict[str, tuple[str, bytes]] = {}  # by digest
  said: dict[str, list[str]] = collections.defaultdict(list)
  for icon, texts in captions.items():
    try:
      jpeg = draw(svg_of(icons, icon, side), side)
    except Unusable as reason:
      left_out[str(reason)] += 1
      continue
    digest = hashlib.sha256(jpeg).hexdigest()
    left_out['same picture as another of the set'] += digest in first
    first.setdefault(digest, (icon, jpeg))
    said[digest] += texts
  drawn = Drawn([], {reason: count for reason, count in sorted(left_out.items()) if count})
  for digest, (icon, jpeg) in first.items():
    texts = list(dict.fromkeys(said[digest]))
    drawn.records.append(Record(icon, texts, label_of(texts), len(jpeg), digest))
  write_whole(f'{folder}/{name}.jpgs', b''.join(jpeg for _, jpeg in first.values()))
  write_whole(f'{folder}/{name}.json', json.dumps(drawn).encode())
  return drawn


def load_drawn(name: str, folder: pathlib.Path) -> Drawn | None:
  """What `draw_set` wrote; None: the set is not done."""
  file = folder / f'{name}.json'
  if not file.exists():
    return None
  records, left_out = json.loads(file.read_text())
  return Drawn([Record(*record) for record in records], left_out)


def _captions(icons: dict[str, Any]) -> dict[str, list[str]]:
  """Captions of each icon that is shown: its name, then its aliases in their order."""
  captions = {
    name: [words(name)] for name, icon in icons['icons'].items() if not icon.get('hidden')
  }
  aliases = icons.get('aliases', {})
  for name, alias in aliases.items():
    parent, seen = name, set()
    # An alias that says more than its parent is another picture: turned, moved or hidden.
    while parent in aliases and parent not in seen and aliases[parent].keys() == {'parent'}:
      seen.add(parent)
      parent = aliases[parent]['parent']
    if parent in captions and parent not in aliases:
      captions[parent].append(words(name))
  return {name: [text for text in texts if text] for name, texts in captions.items()}


class Unusable(ValueError):
  """An icon that gives no picture; the message is the reason, the same for all of its kind."""


def svg_of(icons: dict[str, Any], name: str, side: int) -> str:
  """The SVG of an icon of a design set, drawn as a whole in the middle of a square.

  Raises:
    Unusable: its numbers are none, or it is not what a renderer may be given.
  """
  icon = icons['icons'][name]
  left, top, width, height = (
    icon.get(key, icons.get(key, default))
    for key, default in (('left', 0), ('top', 0), ('width', 16), ('height', 16))
  )
  numbers = all(type(n) in (int, float) and abs(n) < 1e6 for n in (left, top, width, height))
  body = icon.get('body')
  if not (numbers and width > 0 and height > 0 and isinstance(body, str)):
    raise Unusable('broken')
  svg = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    f' viewBox="{left} {top} {width} {height}" width="{side}" height="{side}" color="black">'
    f'{body}</svg>'
  )
  _check(svg)
  return svg


def _check(svg: str) -> None:
  """Refuses what would read other files, or is nested so deep that the renderer would die."""
  if len(svg) > _LONGEST:
    raise Unusable('too large')
  depth = 0

  def start(_, attributes):
    nonlocal depth
    depth += 1
    if depth > _DEEPEST:
      raise Unusable('nested too deep')
    for key, value in attributes.items():
      if key.endswith('href') and not _INSIDE.match(value):
        raise Unusable('refers to a file')

  def end(_):
    nonlocal depth
    depth -= 1

  parser = expat.ParserCreate()
  parser.StartElementHandler, parser.EndElementHandler = start, end
  try:
    parser.Parse(svg, True)
  except (expat.ExpatError, UnicodeError) as error:
    raise Unusable('broken') from error


def draw(svg: str, side: int) -> bytes:
  """The JPEG (side, side, 3) of an SVG of that side, on white.

  Raises:
    Unusable: the renderer refuses it, or it comes out blank.
  """
  import resvg_py  # optional, and asked for before

  try:
    # Fonts of this machine would make other pictures than those of another.
    png = resvg_py.svg_to_bytes(svg_string=svg, background='white', skip_system_fonts=True)
  except BaseException as error:
    # What goes wrong inside of the renderer is no Exception.
    if isinstance(error, ValueError) or type(error).__name__ == 'PanicException':
      raise Unusable('broken') from error
    raise
  image = Image.open(io.BytesIO(bytes(png))).convert('RGB')
  darkest, lightest = image.convert('L').getextrema()
  if lightest - darkest < _LEAST_CONTRAST:
    raise Unusable('blank')
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=_QUALITY)
  return out.getvalue()
