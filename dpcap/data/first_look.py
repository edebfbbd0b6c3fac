"""A look at a few records before a run trains on all of them.

An index counts files. Whether the json has its captions under the key that the config names, and
whether the images are images, shows when records are read: a run in which none can be used would
add noise to nothing, step for step.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from dpcap.data.examples import check_known
from dpcap.data.image import open_image
from dpcap.data.source import BadRecord, Source, choose_caption, read_each

# So many that a share of one half shows to within an eighth, and read in a moment from any store.
RECORDS = 64
_REASONS_TOLD = 3

# What must hold for a record to have a field.
_CHECKS = {
  'tokens': lambda record: choose_caption(record['caption']),
  'label': lambda record: check_known(record['label']),
  'image': lambda record: open_image(record['image']),
}


class FirstLook(NamedTuple):
  """What the records were like.

  Attributes:
    looked_at: how many there were.
    usable: how many of them have the fields that were asked for, an image if it begins as one.
    reasons: the commonest why others are not, 'WHY (HOW MANY)'.
  """

  looked_at: int
  usable: int
  reasons: tuple[str, ...]


def look_at(source: Source, fields: Sequence[str]) -> FirstLook:
  """Looks at up to RECORDS records at equal distances, always the same ones.

  Captions, labels and the headers of images are looked at, pixels are not: what may take long or
  end the process is left to the workers.

  Args:
    source: of the run.
    fields: of an example, see `dpcap.data.examples`.

  Raises:
    StoreError: the storage failed.
  """
  count = min(RECORDS, len(source))
  why = collections.Counter()
  for record in read_each(source, [i * len(source) // count for i in range(count)]):
    try:
      if isinstance(record, BadRecord):
        raise record
      for field in fields:
        if field in _CHECKS:
          _CHECKS[field](record)
    except BadRecord as bad:
      why[str(bad)] += 1
  reasons = tuple(f'{reason} ({n})' for reason, n in why.most_common(_REASONS_TOLD))
  return FirstLook(count, count - why.total(), reasons)
