"""Groups of records that count as one: near duplicates, as tools/deduplicate finds them.

A picture that is there nine times is not protected by the guarantee of one record. Where the group
is the unit (keep 'all'), N is the number of groups, a step draws groups, each by itself, and of a
group that was drawn one record, the same for all views, by that group's generator of that step. So
the records of a group contribute together what one record does, at most C, whatever their number.
With keep 'one' a group is its first record and the others are in no draw: the guarantee speaks of
those that are kept.

Groups, and with them N, are taken as given. Where records are in one group if they hang together by
pairs that are alike, a whole group can be replaced by nothing and the others stay as they are. With
a single record more or less, two groups may become one, or one two: no guarantee speaks of that.

A file of groups is one array, uint32 in npy format: where each group starts and where the last one
ends (groups + 1), then the numbers of all records, group by group, each group's first one first.
Its name holds a digest of its content, so that it never changes.
"""

import functools
import hashlib
import io
from typing import NamedTuple

import numpy as np

from dpcap.data.byte_ranges import ask, find_store, is_local, read_file
from dpcap.data.tar_index import write_whole

KEEP = ('all', 'one')


class Groups(NamedTuple):
  """Groups of the records 0 to `records` of a source, no record in two of them.

  Attributes:
    file: path or URL, see above.
    count: groups.
    records: those of the source, also those that are in no group.
    keep: one of KEEP.
  """

  file: str
  count: int
  records: int
  keep: str

  @property
  def digest(self) -> str:
    """Of which records are in which group."""
    return self.file.rsplit('.', 2)[1]

  @property
  def units(self) -> str:
    """What is counted, for people."""
    return 'that were kept' if self.keep == 'one' else 'groups of near duplicates'

  @property
  def not_covered(self) -> str:
    """What a guarantee for these units leaves out, for the statement."""
    if self.keep == 'one':
      return (
        'near duplicates of the records that were kept: they were left out and are not in N, and'
        ' which ones are kept, and so how many, was told from the private data'
      )
    return (
      'which records are near duplicates, and so N: the groups were told from the private data,'
      ' where a single record can join two of them'
    )

  def unit(self, one: str) -> str:
    """The unit of privacy in words, where that of a single record is `one`."""
    return one if self.keep == 'one' else f'group of near-duplicate {one}s'

  def record(self, group: int, rng: np.random.Generator | None = None) -> int:
    """The number of a group's record: drawn, each with the same probability, or the first.

    Nothing is drawn where there is no choice.

    Args:
      group: its number.
      rng: what draws; None: the first.

    Raises:
      IndexError: there is no such group.
      StoreError: the file cannot be read.
    """
    if not 0 <= group < self.count:
      raise IndexError(f'group {group} out of range: there are {self.count}')
    starts, members = _load(self.file, self.count)
    start, stop = map(int, starts[group : group + 2])
    if rng is None or stop - start < 2:
      return int(members[start])
    return int(members[start + int(rng.integers(stop - start))])


def write(file: str, firsts: np.ndarray, keep: str) -> Groups:
  """Writes groups beside a file that will name them.

  Args:
    file: path or URL of the manifest, ending in '.json'.
    firsts: int64 (records,): of every record the first one of its group, itself if it is that.
    keep: one of KEEP.

  Raises:
    OSError: it cannot be written.
    ValueError: the firsts are none, or there are more records than 32 bits count.
  """
  numbers = np.arange(len(firsts))
  if len(firsts) >= 2**32 or np.any(firsts > numbers) or np.any(firsts[firsts] != firsts):
    raise ValueError('firsts must be the first of each group, of less than 2^32 records')
  if keep == 'one':
    members = np.flatnonzero(firsts == numbers)
    starts = np.arange(len(members) + 1)
  else:
    members = np.argsort(firsts, kind='stable')
    is_start = firsts[members] == members
    starts = np.append(np.flatnonzero(is_start), len(members))
  out = io.BytesIO()
  np.save(out, np.concatenate([starts, members]).astype(np.uint32))
  digest = _digest(out.getvalue())
  groups = Groups(f'{file.removesuffix(".json")}.{digest}.npy', len(starts) - 1, len(firsts), keep)
  write_whole(groups.file, out.getvalue())
  return groups


def check(groups: Groups) -> None:
  """Looks whether a file is as it was written, and of which records `keep` says it is.

  Raises:
    ValueError: it is not, with the reason.
    StoreError: it cannot be read.
  """
  if groups.keep not in KEEP:
    raise ValueError(f'keep is {groups.keep!r}; expected one of {", ".join(KEEP)}')
  if _digest(read_file(groups.file)) != groups.digest:
    raise ValueError(f'{groups.file} changed after it was written')
  starts, members = _load(groups.file, groups.count)
  seen = np.zeros(groups.records, bool)
  if np.any(starts[1:] <= starts[:-1]) or starts[0] or starts[-1] != len(members):
    raise ValueError(f'{groups.file} holds other groups than {groups.count}')
  if np.any(members >= groups.records):
    raise ValueError(f'{groups.file} holds records after {groups.records}')
  seen[members] = True
  if seen.sum() != len(members):
    raise ValueError(f'{groups.file} holds a record twice')
  if len(members) != (groups.count if groups.keep == 'one' else groups.records):
    raise ValueError(f'keep is {groups.keep!r}, but {groups.file} was not written so')


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _load(file: str, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Starts (count + 1,) and members; of a local file they stay on disk, shared by processes."""
  if is_local(file):
    path = find_store(file)[1]
    array = ask(lambda: np.load(path, mmap_mode='r'), file, 'its groups')
  else:
    array = np.load(io.BytesIO(read_file(file)))
  return array[: count + 1], array[count + 1 :]
