"""Image-text pairs in tar shards, as img2dataset writes them and webdataset reads them.

A shard holds members KEY.EXT, and consecutive members of the same KEY are one sample: 000123.jpg,
000123.txt, 000123.json. Its image makes it one; what else lies in a shard is not counted. A tar can
only be read from its start, so each shard gets an index of byte offsets (`tar_index`); after that
any record is one ranged read, from a local disk or any fsspec URL.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from dpcap.data import tar_manifest
from dpcap.data.byte_ranges import Span, forget_open_files, read_spans, real_place
from dpcap.data.contents import ImageFiles
from dpcap.data.groups import Groups
from dpcap.data.source import BadRecord, Record, check_label, parse_fields, read_each
from dpcap.data.tar_headers import BLOCK
from dpcap.data.tar_index import (
  THREADS,
  Counts,
  Wanted,
  find_shards,
  index_shard,
  load_image_ids,
  load_table,
  total,
)
from dpcap.errors import UserError
from dpcap.key import GIVEN, Key

# What img2dataset and webdataset shards hold.
IMAGE_KEYS = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'avif')


def make_wanted(image_keys: str | None, caption_key: str, label_key: str | None) -> Wanted:
  """What the indexes of a source must hold, from its arguments.

  Args:
    image_keys: extensions of image members, parted by commas; None: IMAGE_KEYS.
    caption_key: an extension, or 'json:FIELD'.
    label_key: field of the json whose values are collected, or None.

  Raises:
    UserError: caption_key is neither, or an extension of image_keys is empty.
  """
  images = IMAGE_KEYS if image_keys is None else tuple(image_keys.lower().split(','))
  if not all(images):
    raise UserError(f"image_keys is {image_keys!r}; expected extensions, such as 'jpg,png'")
  prefix, _, field = caption_key.partition(':')
  if field and prefix != 'json':
    raise UserError(f"caption_key is {caption_key!r}; expected an extension or 'json:FIELD'")
  return Wanted(images, '' if field else caption_key.lower(), label_key)


class TarShards:
  """A source over the samples of many tar shards; see `dpcap.data.source.Source`.

  The number of samples is fixed here and counts every image that lies in the shards, also those
  without a caption: these turn out bad when they are drawn. A shard that is damaged, empty, no tar,
  or whose samples lie in pieces is left out as a whole, with a warning.

  Args:
    path: a folder of *.tar, one file, a glob pattern, a brace range such as
      'gs://bucket/{00000..00041}.tar', or a list of these; local, or any URL that fsspec opens. Or
      the manifest (*.json) that tools/index_shards wrote: then nothing is indexed here, and the
      shards are those that were whole when it was written. With one of tools/deduplicate a record
      is a group of samples, see `groups`; reading it gives one of them.
    image_keys: extensions of image members, parted by commas; None: IMAGE_KEYS.
    caption_key: extension of the caption member, or 'json:FIELD' for a field of the json member,
      which may be a list of captions.
    label_key: field of the json member that names the class, if there are labels.
    class_names: the classes in the order of their ids. None: all names found, sorted (whole
      numbers as numbers), which reads every json member the first time. An integer label is an
      id if the names are given, a name if they are not.
    index_dir: folder for the index files, local or a URL; None: beside the shards.

  Attributes:
    class_names: tuple of names, empty without `label_key`.
    groups: of the samples, see `dpcap.data.groups`; None: each is a record by itself.
    fingerprint: of names, sizes and times of all shards in use.
    about: what the indexes counted, for people.

  Raises:
    UserError: no shard matches, a named shard is missing, no shard holds a sample, the index
      cannot be written, or the manifest is of other shards or members.
    StoreError: a shard cannot be read.
  """

  KEYS = {
    'path': Key(
      str,
      '',
      'folder, glob, brace range or URL of the tar shards, or a manifest of tools.index_shards'
      ' or tools.deduplicate',
      check=GIVEN,
    ),
    'image_keys': Key(
      str,
      None,
      "extension of the image, all that follows the first dot; several as 'jpg,png'; None: the"
      ' usual ones',
      optional=True,
      check=GIVEN,
    ),
    'caption_key': Key(
      str, 'txt', "extension of the caption, or 'json:FIELD', which may be a list of captions"
    ),
    'label_key': Key(str, None, 'field of the json with the label', optional=True),
    'index_dir': Key(
      str,
      None,
      'folder or URL where byte-offset indexes go; None: beside the shards',
      optional=True,
      fixed=False,
    ),
  }

  def __init__(
    self,
    path: str | os.PathLike | Sequence[str | os.PathLike],
    image_keys: str | None = None,
    caption_key: str = 'txt',
    label_key: str | None = None,
    class_names: Sequence[str] | None = None,
    index_dir: str | os.PathLike | None = None,
  ):
    if class_names is not None and label_key is None:
      raise UserError('class_names is given without label_key; expected the json field too')
    collect = label_key is not None and class_names is None
    wanted = make_wanted(image_keys, caption_key, label_key if collect else None)
    forget_open_files()
    self._caption_field = caption_key.partition(':')[2]
    self._label_key = label_key
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith('.json'):
      if index_dir is not None:
        raise UserError(f'index_dir is {index_dir}; expected None: {path} names its index files')
      indexes, _, self.groups = tar_manifest.read(os.fspath(path), wanted)
    else:
      self.groups = None
      shards = find_shards(path)
      with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        indexes = list(pool.map(lambda shard: index_shard(shard, wanted, index_dir), shards))
    used = [index for index in indexes if index.count]
    if not used:
      first = ''.join(f'; {index.shard}: {index.problem}' for index in indexes[:1])
      raise UserError(
        f'data path {path}: {len(indexes)} shard(s) found, but none holds a sample that can be'
        f' read{first}'
      )
    for index in indexes:
      if index.problem:
        logging.warning('%s: shard left out: %s', index.shard, index.problem)
    counts = total(index.counts for index in used)
    self.about = describe_counts(sum(index.count for index in used), counts, wanted, self.groups)
    if counts.strays or counts.repeated or counts.images < sum(index.count for index in used):
      logging.warning('data path %s: %s', path, self.about)
    self._shards = [index.shard for index in used]
    self._indexes = [(index.file, index.state) for index in used]
    self._ends = list(itertools.accumulate(index.count for index in used))
    of_groups = [self.groups.digest] if self.groups else []
    states = [caption_key, *((index.shard, index.state) for index in used), *of_groups]
    self.fingerprint = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    if collect:
      order = lambda name: (0, int(name), '') if name.isdecimal() else (1, 0, name)
      class_names = sorted({name for index in used for name in index.labels}, key=order)
    self.class_names = tuple(class_names or ())
    # Names collected from integers stand for themselves; given ones are addressed by their index.
    self._integer_is_id = not collect
    self._label_ids = {name: i for i, name in enumerate(self.class_names)}

  @property
  def contents(self) -> ImageFiles:
    """The shards, and the images in them, also those that duplicates were kept of."""
    return ImageFiles(
      'tar_shards',
      self.fingerprint,
      frozenset(map(real_place, self._shards)),
      [functools.partial(load_image_ids, *index) for index in self._indexes],
      self._ends[-1],
    )

  def __len__(self) -> int:
    return self.groups.count if self.groups else self._ends[-1]

  def __getitem__(self, index: int) -> Record:
    """Reads the byte ranges of one sample; see `dpcap.data.source.Source`.

    A sample without an image member has image b'', one without a caption member has caption None.

    Raises:
      BadRecord: the json is damaged, or the label is none of the given classes.
      IndexError: the index is out of range.
      StoreError: the storage failed. The record is not to blame: the run should stop, then replay
        the step.
    """
    (record,) = read_each(self, [index])
    if isinstance(record, BadRecord):
      raise record
    return record

  def read_samples(self, numbers: Sequence[int]) -> Iterator[Record | BadRecord]:
    """Samples by their numbers among all that the shards hold; reads ahead from remote shards.

    Raises:
      IndexError, StoreError: as `__getitem__`.
    """
    rows = [self._spans(number) for number in numbers]
    contents = read_spans([span for row in rows for span in row if span])
    for row in rows:
      yield self._record(*[next(contents) if span else None for span in row])

  def where(self, sample: int) -> str:
    """The shard that holds the sample of that number."""
    return self._shards[bisect.bisect_right(self._ends, sample)]

  def _spans(self, sample: int) -> list[Span | None]:
    """Where the image, the caption and the json of a sample lie; None: absent or not needed."""
    if not 0 <= sample < self._ends[-1]:
      raise IndexError(f'sample {sample} out of range: the shards hold {self._ends[-1]}')
    shard = bisect.bisect_right(self._ends, sample)
    row = load_table(*self._indexes[shard])[sample - (self._ends[shard - 1] if shard else 0)]
    needed = (True, not self._caption_field, bool(self._caption_field or self._label_key))
    spans = []
    for (block, size), need in zip(row.tolist(), needed):
      start = block * BLOCK
      spans.append(Span(self._shards[shard], start, start + size) if need and size else None)
    return spans

  def _record(self, image, caption, fields_json) -> Record | BadRecord:
    try:
      fields = parse_fields(fields_json)
      if self._caption_field:
        caption = fields.get(self._caption_field)
      return Record(image=image or b'', caption=caption, label=self._label(fields))
    except BadRecord as bad:
      return bad

  def _label(self, fields: dict[str, Any]) -> int:
    value = check_label(fields.get(self._label_key))
    if value is None:
      return -1
    if isinstance(value, int) and self._integer_is_id and 0 <= value < len(self.class_names):
      return value
    if str(value) not in self._label_ids:
      raise BadRecord(f'label {value!r} is none of the {len(self.class_names)} classes')
    return self._label_ids[str(value)]


def describe_counts(
  samples: int, counts: Counts, wanted: Wanted, groups: Groups | None = None
) -> str:
  """What indexes counted, and groups of the samples, for people."""
  caption = f'KEY.{wanted.caption_key or "json"}'
  said = f'N = {groups.count:,} {groups.units} of ' if groups else 'N = '
  said += f'{samples:,} samples: {counts.images:,} with an image that holds anything,'
  said += f' {counts.captions:,} with {caption}, {counts.both:,} with both'
  if counts.repeated:
    said += f'; {counts.repeated:,} have the key of another one'
  if counts.strays:
    said += f'; {counts.strays:,} keys without an image (strays) do not count'
  return f'{said}; extensions there: {counts.listed_extensions()}'
