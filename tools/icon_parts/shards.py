"""From drawn design sets to the tar shards of each split, and the page on what is in them."""

import collections
import hashlib
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from dpcap.data import tar_manifest
from dpcap.data.tar_index import index_shard, write_whole
from dpcap.data.tar_shards import make_wanted
from tools.icon_parts.drawing import CONCEPTS, Drawn, Record
from tools.icon_parts.package import Package
from tools.icon_parts.splits import SPLITS, license_of, split_of

PICTURES_PER_SHARD = 5_000


class Entry(NamedTuple):
  """A record of a split, and where its picture lies."""

  order: str  # a hash of set and name: the order within the split, the same every time
  set: str
  start: int  # of the JPEG in the set's file of pictures
  record: Record


def entries(name: str, drawn: Drawn) -> Iterable[Entry]:
  """The entries of a drawn set."""
  start = 0
  for record in drawn.records:
    order = hashlib.sha256(f'{name}/{record.name}'.encode()).hexdigest()
    yield Entry(order, name, start, record)
    start += record.size


def arrange(sets: dict[str, tuple[str, Drawn]]) -> tuple[dict[str, list[Entry]], dict[str, int]]:
  """Sorts out which record goes where.

  Of the held-out splits only labelled records are kept, and none whose picture a set of another
  split has too: train keeps it, then test.

  Args:
    sets: (split, what was drawn) by the name of each design set.

  Returns:
    The entries of each split in their order; how many held-out records were left out, by reason.
  """
  kept: dict[str, list[Entry]] = {split: [] for split in SPLITS}
  left_out = {'without a label': 0, 'same picture as in another split': 0}
  taken: set[str] = set()
  for split in ('train', 'test', 'probe'):
    for name, (of, drawn) in sets.items():
      if of != split:
        continue
      for entry in entries(name, drawn):
        if split != 'train' and entry.record.digest in taken:
          left_out['same picture as in another split'] += 1
        elif split != 'train' and entry.record.label is None:
          left_out['without a label'] += 1
        else:
          kept[split].append(entry)
    taken.update(entry.record.digest for entry in kept[split])
    kept[split].sort()
  return kept, left_out


def write_split(out: pathlib.Path, split: str, kept: list[Entry], drawn: pathlib.Path) -> int:
  """Writes OUT/SPLIT/NNNNN.tar, their indexes, and OUT/SPLIT/manifest.json.

  A sample is KEY.jpg and KEY.json: {"captions", "label", "set", "icon"}, no label where there is
  none. Equal entries give equal shards.

  Args:
    drawn: the folder of the design sets' pictures.

  Returns:
    The number of shards.

  Raises:
    OSError: something cannot be read or written.
  """
  wanted = make_wanted(None, 'json:captions', 'label')
  folder = out / split
  indexes = []
  for number, first in enumerate(range(0, len(kept), PICTURES_PER_SHARD)):
    shard = _tar(first, kept[first : first + PICTURES_PER_SHARD], drawn)
    file = str(folder / f'{number:05d}.tar')
    write_whole(file, shard)
    indexes.append(index_shard(file, wanted))
  tar_manifest.write(str(folder / 'manifest.json'), indexes, wanted)
  return len(indexes)


def _tar(first: int, kept: list[Entry], drawn: pathlib.Path) -> bytes:
  files = {}
  out = io.BytesIO()
  try:
    with tarfile.open(fileobj=out, mode='w', format=tarfile.USTAR_FORMAT) as tar:
      for key, entry in enumerate(kept, first):
        if entry.set not in files:
          files[entry.set] = open(drawn / f'{entry.set}.jpgs', 'rb')
        jpeg = os.pread(files[entry.set].fileno(), entry.record.size, entry.start)
        fields: dict[str, Any] = {'captions': entry.record.captions}
        if entry.record.label is not None:
          fields['label'] = entry.record.label
        fields |= {'set': entry.set, 'icon': entry.record.name}
        for extension, content in (('jpg', jpeg), ('json', json.dumps(fields).encode())):
          member = tarfile.TarInfo(f'{key:09d}.{extension}')
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
  finally:
    for file in files.values():
      file.close()
  return out.getvalue()


def count(kept: list[Entry]) -> dict[str, int]:
  """How much there is in a split."""
  return {
    'sets': len({entry.set for entry in kept}),
    'pictures': len(kept),
    'captions': sum(len(entry.record.captions) for entry in kept),
    'labelled': sum(entry.record.label is not None for entry in kept),
  }


def describe(package: Package, kept: dict[str, list[Entry]], summary: dict[str, Any]) -> str:
  """The page DATA.md: splits, concepts, design sets with authors and licences, what is left out."""
  lines = [
    '# Icons',
    '',
    f'Icons of @iconify/json {package.version}, drawn at {summary["side"]} x {summary["side"]}'
    ' pixels on white by `python -m tools.prepare_icons`. Captions are the names that their'
    ' designers gave them; aliases are further captions of the same picture, which is one record.',
    '',
    'Splits are by design set. `train` is what a model learns from, `probe` fits linear probes,'
    ' `test` tests. Of `probe` and `test` only pictures with a label are kept, and none that'
    ' another split has too. `vocabulary.txt` holds the words of all names in the sets of `probe`:'
    f' {summary["vocabulary"]:,} entries.',
    '',
    *_table(
      ('split', 'design sets', 'pictures', 'captions', 'labelled', 'shards'),
      [(split, *counts.values()) for split, counts in summary['splits'].items()],
    ),
    '',
    f'Labels are {len(CONCEPTS)} words, where captions hold exactly one of them:',
    '',
    *_table(
      ('concept', *SPLITS),
      [
        (word, *(sum(e.record.label == word for e in kept[split]) for split in SPLITS))
        for word in CONCEPTS
      ],
    ),
    '',
    'The pictures are the work of these authors, under their licences:',
    '',
  ]
  sizes = collections.Counter(entry.set for split in SPLITS for entry in kept[split])
  rows = []
  for name, about in sorted(package.collections.items()):
    split = split_of(name, about)
    author = about.get('author', {}).get('name', '')
    reasons = summary['left_out_by_set'].get(name, {})
    left_out = ', '.join(f'{count} {reason}' for reason, count in reasons.items())
    licence = license_of(about) or 'unknown'
    rows.append((name, author, licence, split or '-', sizes[name], left_out))
  head = ('design set', 'author', 'licence', 'split', 'pictures', 'icons that gave none')
  return '\n'.join([*lines, *_table(head, rows), ''])


def _table(head: tuple, rows: Iterable[tuple]) -> list[str]:
  cells = [[f'{c:,}' if isinstance(c, int) else str(c).replace('|', '/') for c in r] for r in rows]
  return [f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *cells]]
