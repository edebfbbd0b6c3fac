"""Which copies of a picture tools.deduplicate finds: recall by what was done to them.

    python -m tools.bench_duplicates MANIFEST [--pictures=3000] [--bits=4]

Pictures at equal distances among those of the manifest are copied in each way, and each copy is
compared with its picture alone. Prints one JSON line: {"pictures", "bits", "found": {way: share}}.
Exits 2 if something is wrong.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import io
import json
import sys
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from dpcap.data import tar_manifest
from dpcap.data.image import decode
from dpcap.data.source import BadRecord
from dpcap.data.tar_shards import TarShards
from dpcap.errors import UserError
from tools.arguments import Parser, program
from tools.dedup_parts import near
from tools.dedup_parts.pictures import look_at


def _jpeg(image: Image.Image, quality: int) -> bytes:
  out = io.BytesIO()
  image.save(out, 'JPEG', quality=quality)
  return out.getvalue()


def _png(image: Image.Image) -> bytes:
  out = io.BytesIO()
  image.save(out, 'PNG')
  return out.getvalue()


def _resized(image: Image.Image, width: float, height: float) -> Image.Image:
  size = max(1, round(width * image.width)), max(1, round(height * image.height))
  return image.resize(size, Image.Resampling.BICUBIC)


def _cut(image: Image.Image, left: int, right: int) -> Image.Image:
  return image.crop((left, left, image.width - right, image.height - right))


def _in_blue(image: Image.Image) -> Image.Image:
  """Blue where it was black."""
  bands = zip(image.split(), (20, 60, 200))
  return Image.merge('RGB', [b.point(lambda v, c=c: c + (255 - c) * v // 255) for b, c in bands])


# In words -> the file of a copy.
COPIES: dict[str, Callable[[Image.Image], bytes]] = {
  'twice the size': lambda image: _png(_resized(image, 2, 2)),
  'half the size': lambda image: _png(_resized(image, 0.5, 0.5)),
  '3/4 of the size, JPEG 75': lambda image: _jpeg(_resized(image, 0.75, 0.75), 75),
  'stretched by 4/3, JPEG 60': lambda image: _jpeg(_resized(image, 4, 3), 60),
  'JPEG 85': lambda image: _jpeg(image, 85),
  'JPEG 50': lambda image: _jpeg(image, 50),
  'JPEG 30': lambda image: _jpeg(image, 30),
  'grey': lambda image: _png(image.convert('L')),
  'less contrast': lambda image: _png(image.point(lambda v: int(0.6 * v + 60))),
  'blue for black': lambda image: _png(_in_blue(image)),
  'gamma 1.8': lambda image: _png(image.point(lambda v: int(255 * (v / 255) ** 1.8))),
  'mirrored': lambda image: _png(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
  '1 pixel cut off at two sides': lambda image: _png(_cut(image, 1, 0)),
  '2 pixels cut off at each side': lambda image: _png(_cut(image, 2, 2)),
  'negative': lambda image: _png(image.point(lambda v: 255 - v)),
}


def recall(images: list[Image.Image], bits: int) -> dict[str, float]:
  """The share of copies that are taken for near duplicates of their pictures, by way of copying."""
  thumbnails = np.stack([look_at(_png(image))[1] for image in images])
  hashes = near.hashes(thumbnails)
  found = {}
  for way, copy in COPIES.items():
    copies = np.stack([look_at(copy(image))[1] for image in images])
    close = np.bitwise_count(near.hashes(copies) ^ hashes) <= bits
    found[way] = float(np.mean(close & near.alike(copies, thumbnails)))
  return found


def _decoded(source: TarShards, numbers: list[int]) -> Iterator[Image.Image]:
  for number in numbers:
    try:
      yield decode(source[number]['image'])
    except BadRecord:
      continue


@program
def main(argv: list[str] | None) -> None:
  """Copies pictures, compares, and prints the shares."""
  parser = Parser('tools.bench_duplicates', __doc__)
  parser.add_argument('manifest', metavar='MANIFEST', help='of tools.index_shards')
  parser.add_argument('--pictures', type=int, default=3_000, help='how many')
  parser.add_argument('--bits', type=int, default=4, help='as of tools.deduplicate')
  options = parser.parse_args(argv)
  if options.pictures < 1:
    raise UserError(f'--pictures={options.pictures} must be 1 or more')
  if not 0 <= options.bits <= near.MOST_BITS:
    raise UserError(f'--bits={options.bits} must be 0 to {near.MOST_BITS}')
  caption_key = tar_manifest.read(options.manifest).wanted.caption_key
  source = TarShards(options.manifest, caption_key=caption_key or 'json:')  # none is read
  numbers = np.linspace(0, len(source) - 1, min(options.pictures, len(source))).astype(int)
  images = list(_decoded(source, numbers.tolist()))
  if not images:
    raise UserError(f'MANIFEST is {options.manifest}: no picture can be decoded')
  found = {way: round(share, 4) for way, share in recall(images, options.bits).items()}
  print(json.dumps({'pictures': len(images), 'bits': options.bits, 'found': found}))


if __name__ == '__main__':
  sys.exit(main())
