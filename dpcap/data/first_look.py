"""A look at a few records before a run trains on all of them.

An index counts files. Whether the json has its captions under the key that the config names, and
whether the images are images, shows when records are read: a run in which none can be used would
add noise to nothing, step for step.
"""

import collections
from typing import NamedTuple

from dpcap.data.image import open_image
from dpcap.data.source import BadRecord, Source, choose_caption, read_each

# So many that a share of one half shows to within an eighth, and read in a moment from any store.
RECORDS = 64
_REASONS_TOLD = 3


class FirstLook(NamedTuple):
  """What the records were like.

  Attributes:
    looked_at: how many there were.
    usable: how many of them have a caption and what begins as an image.
    reasons: the commonest why others are not, 'WHY (HOW MANY)'.
  """

  looked_at: int
  usable: int
  reasons: tuple[str, ...]


def look_at(source: Source) -> FirstLook:
  """Looks at up to RECORDS records at equal distances, always the same ones.

  Captions and the headers of images are looked at, pixels are not: what may take long or end the
  process is left to the workers.

  Raises:
    StoreError: the storage failed.
  """
  count = min(RECORDS, len(source))
  why = collections.Counter()
  for record in read_each(source, [i * len(source) // count for i in range(count)]):
    try:
      if isinstance(record, BadRecord):
        raise record
      choose_caption(record['caption'])
      open_image(record['image'])
    except BadRecord as bad:
      why[str(bad)] += 1
  reasons = tuple(f'{reason} ({n})' for reason, n in why.most_common(_REASONS_TOLD))
  return FirstLook(count, count - why.total(), reasons)
