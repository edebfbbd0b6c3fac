"""What is kept of each picture of a shard to find it again: pixels exactly, and how it looks.

Made once, in one small file per shard beside its index; a shard that has it is not read again.
"""

import errno
import hashlib
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dpcap.data.byte_ranges import Span, StoreError, read_file, read_spans
from dpcap.data.image import decode
from dpcap.data.source import BadRecord
from dpcap.data.tar_headers import BLOCK
from dpcap.data.tar_index import Index, load_table, write_whole

SIDE = 16  # of a thumbnail
_FORMAT = 'dpcap pictures 1'


class Pictures(NamedTuple):
  """The pictures of one shard, or of several, in the order of their samples.

  Attributes:
    digests: uint64 (n,), of size and pixels; 0: it cannot be decoded.
    thumbnails: uint8 (n, SIDE, SIDE), the whole picture squeezed to a square, its luminance.
  """

  digests: np.ndarray
  thumbnails: np.ndarray


def load_all(indexes: Sequence[Index]) -> Pictures:
  """The pictures of all shards, which have their files.

  Raises:
    StoreError: a file cannot be read, or is of another state of its shard.
  """
  count = sum(index.count for index in indexes)
  found = Pictures(np.zeros(count, np.uint64), np.zeros((count, SIDE, SIDE), np.uint8))
  start = 0
  for index in indexes:
    of_shard = load(index)
    if of_shard is None:
      raise StoreError(errno.ESTALE, 'it changed since it was made', file_of(index))
    for array, part in zip(found, of_shard):
      array[start : start + index.count] = part
    start += index.count
  return found


def file_of(index: Index) -> str:
  """Where the file of a shard lies."""
  return f'{index.file.removesuffix(".npz")}.pictures.npz'


def read_shard(index: Index) -> bool:
  """Makes the file of a shard where there is none; whether it made one.

  Raises:
    StoreError: the shard cannot be read.
    OSError: the file cannot be written.
  """
  if load(index) is not None:
    return False
  table = load_table(index.file, index.state)
  starts = table[:, 0, 0].astype(np.int64) * BLOCK
  spans = [Span(index.shard, a, a + b) for a, b in zip(starts.tolist(), table[:, 0, 1].tolist())]
  digests = np.zeros(len(spans), np.uint64)
  thumbnails = np.zeros((len(spans), SIDE, SIDE), np.uint8)
  for number, content in enumerate(read_spans(spans)):
    try:
      digests[number], thumbnails[number] = look_at(content)
    except BadRecord:
      continue
  out = io.BytesIO()
  meta = np.frombuffer(json.dumps([_FORMAT, index.state]).encode(), np.uint8)
  np.savez(out, meta=meta, digests=digests, thumbnails=thumbnails)
  write_whole(file_of(index), out.getvalue())
  return True


def look_at(image: bytes) -> tuple[int, np.ndarray]:
  """Digest and thumbnail of an image file.

  Raises:
    BadRecord: it cannot be decoded.
  """
  rgb = decode(image)
  digest = hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=8).digest()
  # Of the filters of Pillow this one differs least between a picture and its smaller copies.
  small = rgb.convert('L').resize((SIDE, SIDE), Image.Resampling.BICUBIC)
  return int.from_bytes(digest) or 1, np.asarray(small)


def load(index: Index) -> Pictures | None:
  """What the file of a shard holds; None: it is not there, or of another state of the shard.

  Raises:
    StoreError: the store does not tell.
  """
  try:
    arrays = np.load(io.BytesIO(read_file(file_of(index))))
    if json.loads(arrays['meta'].tobytes()) != [_FORMAT, index.state]:
      return None
    return Pictures(arrays['digests'], arrays['thumbnails'])
  except StoreError as error:
    if isinstance(error.__cause__, FileNotFoundError):
      return None
    raise
  except (ValueError, LookupError, EOFError):
    return None
