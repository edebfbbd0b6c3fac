"""The manifest of a set of indexed tar shards: which shards a run uses, and how many samples.

Written by tools/index_shards and read by the source, so that N is settled before a run starts:
what was left out stays left out, and a shard that changed is refused.
"""

import concurrent.futures
import json
from collections.abc import Sequence

from dpcap.data.byte_ranges import StoreError, read_file
from dpcap.data.tar_index import THREADS, Index, Wanted, state_of, write_whole
from dpcap.errors import UserError

_FORMAT = 'dpcap tar manifest 2'


def write(file: str, indexes: Sequence[Index], wanted: Wanted) -> None:
  """Writes the manifest of all shards; those with a problem are listed apart.

  Args:
    file: path or URL, ending in '.json'.
    indexes: of all shards, in the order of their samples.
    wanted: what the indexes hold.

  Raises:
    OSError: it cannot be written.
  """
  used = [index for index in indexes if index.count]
  content = {
    'format': _FORMAT,
    'examples': sum(index.count for index in used),
    'bytes': sum(index.size for index in used),
    'wanted': wanted._asdict(),
    'shards': [index._replace(new=False)._asdict() for index in used],
    'left_out': {index.shard: index.problem for index in indexes if not index.count},
  }
  write_whole(file, (json.dumps(content, indent=1) + '\n').encode())


def read(file: str, wanted: Wanted) -> list[Index]:
  """The indexes of the shards that a manifest lists, which are as they were when it was written.

  Raises:
    UserError: the file is no manifest, is of other members, or a shard changed since.
    StoreError: it, or a shard, cannot be read.
  """
  try:
    content = json.loads(read_file(file))
    if content['format'] != _FORMAT:
      raise ValueError(f'format {content["format"]!r}')
    indexes = [Index(**entry | {'labels': tuple(entry['labels'])}) for entry in content['shards']]
    held = Wanted(**content['wanted'] | {'image_keys': tuple(content['wanted']['image_keys'])})
  except StoreError as error:
    raise UserError(f'data path {file}: cannot be read ({error.strerror})') from error
  except (ValueError, LookupError, TypeError) as error:
    raise UserError(
      f'data path {file}: not a manifest of tar shards ({error}); expected one that'
      ' tools.index_shards wrote'
    ) from error
  for key, value in wanted._asdict().items():
    # Labels that were collected and are not asked for do no harm.
    if value is not None and value != getattr(held, key):
      raise UserError(
        f'data path {file}: was made for {key} {getattr(held, key)!r}, this config has {value!r};'
        ' make one with tools.index_shards'
      )
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    states = pool.map(lambda index: state_of(index.shard, held)[1], indexes)
    for index, state in zip(indexes, states):
      if state != index.state:
        raise UserError(
          f'data path {file}: shard {index.shard} changed after this manifest was written; run'
          ' tools.index_shards again'
        )
  return indexes
