"""A picture of groups, to see whether they are what they should be."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dpcap.data import image as image_ops
from dpcap.data.byte_ranges import Span, read
from dpcap.data.source import BadRecord
from dpcap.data.tar_headers import BLOCK
from dpcap.data.tar_index import Index, load_table

_SIDE = 64
_IN_A_ROW = 8
_COLUMNS = 2  # of groups
_LARGEST, _OTHERS = 20, 60


def draw(file: str, indexes: Sequence[Index], firsts: np.ndarray) -> None:
  """Writes a PNG of the largest groups and, below them, of others at random: a row of each.

  Of a large group pictures at equal distances are shown.

  Args:
    file: local.
    indexes: of all shards.
    firsts: int64 (n,), see `near.find_groups`.

  Raises:
    OSError: a shard cannot be read, or the file not written.
  """
  sizes = np.bincount(firsts)
  several = np.flatnonzero(sizes > 1)
  several = several[np.argsort(-sizes[several], kind='stable')]
  others = np.random.default_rng(0).permutation(several[_LARGEST:])[:_OTHERS]
  chosen = np.concatenate([several[:_LARGEST], others])
  rows = -(-len(chosen) // _COLUMNS)
  size = (_COLUMNS * (_IN_A_ROW + 1) * _SIDE, max(rows, 1) * (_SIDE + 4))
  page = Image.new('RGB', size, 'gray')
  for place, first in enumerate(chosen.tolist()):
    row, column = divmod(place, _COLUMNS)
    members = np.flatnonzero(firsts == first)
    shown = np.linspace(0, len(members) - 1, min(len(members), _IN_A_ROW)).round().astype(int)
    for number, member in enumerate(members[shown].tolist()):
      at = ((column * (_IN_A_ROW + 1) + number) * _SIDE, row * (_SIDE + 4))
      page.paste(_picture(indexes, member), at)
  page.save(file)


def _picture(indexes: Sequence[Index], member: int) -> Image.Image:
  for index in indexes:
    if member < index.count:
      break
    member -= index.count
  block, size = load_table(index.file, index.state)[member, 0].tolist()
  content = read(Span(index.shard, block * BLOCK, block * BLOCK + size))
  try:
    return image_ops.decode(content).resize((_SIDE, _SIDE))
  except BadRecord:
    return Image.new('RGB', (_SIDE, _SIDE), 'red')
