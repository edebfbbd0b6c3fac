"""The manifest of a set of indexed tar shards: which shards a run uses, and how many samples.

Written by tools/index_shards and read by the source, so that N is settled before a run starts:
what was left out stays left out, and a shard that changed is refused. One that tools/deduplicate
wrote names a file of groups too, beside it: then N is their number.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpcap.data import groups as groups_lib
from dpcap.data.byte_ranges import StoreError, describe, read_file
from dpcap.data.tar_index import THREADS, Counts, Index, Wanted, state_of, write_whole
from dpcap.errors import UserError

_FORMAT = 'dpcap tar manifest 3'


class Manifest(NamedTuple):
  """What a manifest says.

  Attributes:
    indexes: of the shards in use, in the order of their samples.
    wanted: what the indexes hold.
    groups: of the samples; None: each is one by itself.
  """

  indexes: list[Index]
  wanted: Wanted
  groups: groups_lib.Groups | None


def write(
  file: str, indexes: Sequence[Index], wanted: Wanted, groups: groups_lib.Groups | None = None
) -> None:
  """Writes the manifest of all shards; those with a problem are listed apart.

  Args:
    file: path or URL, ending in '.json'.
    indexes: of all shards, in the order of their samples.
    wanted: what the indexes hold.
    groups: of all samples, their file in the same folder; None: each is one by itself.

  Raises:
    OSError: it cannot be written.
  """
  used = [index for index in indexes if index.count]
  in_groups = {}
  if groups:
    more = {'file': os.path.basename(groups.file), 'of': _samples(used)}
    in_groups = {'groups': groups._asdict() | more}
  content = {
    'format': _FORMAT,
    'examples': groups.count if groups else sum(index.count for index in used),
    **in_groups,
    'bytes': sum(index.size for index in used),
    'wanted': wanted._asdict(),
    'shards': [_as_json(index) for index in used],
    'left_out': {index.shard: index.problem for index in indexes if not index.count},
  }
  write_whole(file, (json.dumps(content, indent=1) + '\n').encode())


def _as_json(index: Index) -> dict[str, Any]:
  return index._replace(new=False, counts=index.counts._asdict())._asdict()


def _from_json(entry: dict[str, Any]) -> Index:
  return Index(**entry | {'labels': tuple(entry['labels']), 'counts': Counts(**entry['counts'])})


def _samples(indexes: Sequence[Index]) -> str:
  """A digest of what the numbers of samples stand for, in whatever folder the shards lie."""
  shards = [(os.path.basename(index.shard), index.state) for index in indexes]
  return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def read(file: str, wanted: Wanted | None = None) -> Manifest:
  """A manifest whose shards are as they were when it was written.

  Args:
    file: path or URL.
    wanted: what the indexes have to hold; None: whatever they do.

  Raises:
    UserError: the file is no manifest, is of other members, counts other examples than its shards,
      or a shard or a file of groups changed or an index went since.
    StoreError: a shard cannot be read.
  """
  try:
    content = json.loads(read_file(file))
    if content['format'] != _FORMAT:
      raise ValueError(f'format {content["format"]!r}')
    indexes = [_from_json(entry) for entry in content['shards']]
    counted = sum(index.count for index in indexes)
    groups = None
    if 'groups' in content:
      entry = dict(content['groups'])
      if entry.pop('of') != _samples(indexes):
        raise ValueError('its groups are of other shards, or of these in another order')
      name = os.path.join(os.path.dirname(file), entry['file'])
      groups = groups_lib.Groups(**entry | {'file': name})
      if groups.records != counted:
        raise ValueError(f'it has groups of {groups.records} examples, its shards have {counted}')
      groups_lib.check(groups)
      counted = groups.count
    if counted != content['examples']:
      raise ValueError(f'it says {content["examples"]} examples, its shards have {counted}')
    held = Wanted(**content['wanted'] | {'image_keys': tuple(content['wanted']['image_keys'])})
  except StoreError as error:
    said = error.filename if error.filename != file else 'it'
    raise UserError(f'data path {file}: {said} cannot be read ({error.strerror})') from error
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise UserError(
      f'data path {file}: not a manifest of tar shards ({error}); expected one that'
      ' tools.index_shards wrote'
    ) from error
  for key, value in wanted._asdict().items() if wanted else ():
    # Labels that were collected and are not asked for do no harm.
    if value is not None and value != getattr(held, key):
      raise UserError(
        f'data path {file}: was made for {key} {getattr(held, key)!r}, this config has {value!r};'
        ' make one with tools.index_shards'
      )
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for problem in pool.map(lambda index: _problem(index, held), indexes):
      if problem:
        raise UserError(f'data path {file}: {problem}; run tools.index_shards again')
  return Manifest(indexes, held, groups)


def _problem(index: Index, held: Wanted) -> str:
  """'', or what is no longer as the manifest says."""
  if state_of(index.shard, held)[1] != index.state:
    return f'shard {index.shard} changed after this manifest was written'
  try:
    describe(index.file)
  except StoreError as error:
    return f'the index {index.file} of shard {index.shard} cannot be read ({error.strerror})'
  return ''
