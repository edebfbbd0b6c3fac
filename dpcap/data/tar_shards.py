"""Image-text pairs in tar shards, as img2dataset writes them and webdataset reads them.

A shard holds members KEY.EXT, and consecutive members of the same KEY are one sample: 000123.jpg,
000123.txt, 000123.json. A tar can only be read from its start, so each shard gets an index of byte
offsets, made once from the tar headers and kept in a small file; after that any record is one
ranged read, from a local disk or any fsspec URL.
"""

import bisect
import concurrent.futures
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import fsspec
import numpy as np
from absl import logging

from dpcap.data.source import BadRecord, Record
from dpcap.errors import UserError

_THREADS = 32  # indexing waits for storage more than it computes
_PARTS = ('image', 'caption', 'json')
# webdataset's rule: the key ends at the first dot of the file name.
_MEMBER_NAME = re.compile(r'^((?:.*/|)[^./][^./]*)\.([^/]+)$')
_BRACE_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_TAR_BLOCK = 512
# Members this close are fetched in one read: on object stores a request costs more than some KB.
_READ_GAP = 2**16


class TarShards:
  """A source over the samples of many tar shards; see `dpcap.data.source.Source`.

  The number of samples is fixed here and counts everything that lies in the shards, also samples
  without an image or a caption: these turn out bad when they are drawn. A shard that is empty, or
  is no tar, is left out and a damaged one keeps the samples before the damage; each gets one
  warning.

  The index lies beside its shard, or where the folder cannot be written (or is remote) in the
  user's cache folder; it is made again when the shard changes or other members are asked for.

  Args:
    path: a folder of *.tar, one file, a glob pattern, a brace range such as
      'gs://bucket/{00000..00041}.tar', or a list of these. Local, or any URL that fsspec opens.
    image_keys: extensions of image members.
    caption_key: extension of the caption member, or 'json:FIELD' for a field of the json member.
    label_key: field of the json member that names the class, if there are labels.
    class_names: the classes in the order of their ids. None: all names found, sorted (whole
      numbers as numbers), which reads every json member the first time. An integer label is an
      id if the names are given, a name if they are not.
    index_dir: local folder for the index files instead.

  Attributes:
    class_names: tuple of names, empty without `label_key`.
    fingerprint: of names, sizes and times of all shards.

  Raises:
    UserError: no shard matches, a named shard is missing, no shard holds a sample, or the index
      cannot be written.
  """

  def __init__(
    self,
    path: str | os.PathLike | Sequence[str | os.PathLike],
    image_keys: Sequence[str] = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff'),
    caption_key: str = 'txt',
    label_key: str | None = None,
    class_names: Sequence[str] | None = None,
    index_dir: str | os.PathLike | None = None,
  ):
    prefix, _, field = caption_key.partition(':')
    if field and prefix != 'json':
      raise UserError(f"caption_key is {caption_key!r}; expected an extension or 'json:FIELD'")
    if class_names is not None and label_key is None:
      raise UserError('class_names is given without label_key; expected the json field too')
    self._caption_field = field
    self._label_key = label_key
    collect = label_key is not None and class_names is None
    wanted = _Wanted(
      tuple(image_keys), '' if field else caption_key, label_key if collect else None
    )
    shards = _find_shards(path)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      indexes = list(pool.map(lambda shard: _index(shard, wanted, index_dir), shards))

    self._shards, self._indexes, counts, names = [], [], [], set()
    for shard, index in zip(shards, indexes):
      if index.problem:
        logging.warning('%s: %s', shard, index.problem)
      if index.count:
        self._shards.append(shard)
        self._indexes.append(index.path)
        counts.append(index.count)
        names.update(index.labels)
    if not counts:
      raise UserError(
        f'data path {path}: {len(shards)} shard(s) found, but none holds a sample;'
        f' expected tar files with members KEY.{image_keys[0]} and KEY.{prefix}'
      )
    self._ends = list(itertools.accumulate(counts))
    states = json.dumps([caption_key, *((s, i.state) for s, i in zip(shards, indexes))])
    self.fingerprint = hashlib.sha256(states.encode()).hexdigest()
    if collect:
      order = lambda name: (0, int(name), '') if name.isdecimal() else (1, 0, name)
      class_names = sorted(names, key=order)
    self.class_names = tuple(class_names or ())
    # Names collected from integers stand for themselves; given ones are addressed by their index.
    self._integer_is_id = not collect
    self._label_ids = {name: i for i, name in enumerate(self.class_names)}

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Record:
    """Reads the byte ranges of one sample; see `dpcap.data.source.Source`.

    A sample without an image member has image b'', one without a caption member has caption None.

    Raises:
      BadRecord: the bytes are gone, the json is damaged, or the label is none of the given classes.
      IndexError: the index is out of range.
      OSError: the storage failed. The record is not to blame: the run should stop, then replay the
        step.
    """
    if not 0 <= index < len(self):
      raise IndexError(f'index {index} out of range: the source holds {len(self)} records')
    shard = bisect.bisect_right(self._ends, index)
    row = index - (self._ends[shard - 1] if shard else 0)
    wanted = [True, not self._caption_field, bool(self._caption_field or self._label_key)]
    spans = _load_table(self._indexes[shard])[row]
    image, caption, fields_json = _read_parts(self._shards[shard], spans, wanted)
    fields = _parse_json(fields_json)
    if self._caption_field:
      caption = fields.get(self._caption_field)
    return Record(image=image or b'', caption=caption, label=self._label(fields))

  def _label(self, fields: dict[str, Any]) -> int:
    value = fields.get(self._label_key)
    if value is None:
      return -1
    if isinstance(value, int) and self._integer_is_id and 0 <= value < len(self.class_names):
      return value
    if str(value) not in self._label_ids:
      raise BadRecord(f'label {value!r} is none of the {len(self.class_names)} classes')
    return self._label_ids[str(value)]


class _Wanted(NamedTuple):
  """What an index has to hold; another answer makes it stale."""

  image_keys: tuple[str, ...]
  caption_key: str  # '' where captions come from the json
  label_key: str | None  # None: no labels are collected


class _Index(NamedTuple):
  """What the parent remembers of a shard's index; the offsets themselves stay in the file."""

  path: str
  count: int
  labels: tuple[str, ...]
  problem: str  # '' or what the user is warned of
  state: str  # size and time of the shard, and what was asked of it


def _find_shards(path) -> list[str]:
  """Expands folders, globs and brace ranges into the sorted files of each."""
  shards = []
  for pattern in [path] if isinstance(path, (str, os.PathLike)) else path:
    pattern = os.fspath(pattern)
    named = _expand_braces(pattern)
    if named != [pattern]:
      with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        missing = [name for name, exists in zip(named, pool.map(_exists, named)) if not exists]
      if missing:
        raise UserError(
          f'data path {pattern}: {len(missing)} of {len(named)} shards missing, first {missing[0]}'
        )
      shards += named
      continue
    fs, root = fsspec.core.url_to_fs(pattern)
    if fs.isdir(root):
      found = fs.glob(f'{glob.escape(root.rstrip("/"))}/*.tar')
      expected = '*.tar files in this folder'
    elif fs.isfile(root):
      found, expected = [root], ''
    elif glob.has_magic(pattern):
      found, expected = fs.glob(root), 'tar files that match this pattern'
    else:
      raise UserError(
        f'data path {pattern}: does not exist;'
        f' expected a folder of *.tar, a file, a glob or a range {{00000..00041}}.tar'
      )
    if not found:
      raise UserError(f'data path {pattern}: no shard found; expected {expected}')
    shards += [name if _is_local(fs) else fs.unstrip_protocol(name) for name in sorted(found)]
  if not shards:
    raise UserError('data path is an empty list; expected at least one folder, file or pattern')
  return shards


def _expand_braces(pattern: str) -> list[str]:
  match = _BRACE_RANGE.search(pattern)
  if not match:
    return [pattern]
  first, last = match.groups()
  if int(first) > int(last):
    raise UserError(
      f'data path {pattern}: the range {match.group()} is empty; expected {{LOW..HIGH}}'
    )
  numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
  heads = (pattern[: match.start()] + number for number in numbers)
  return [head + tail for head in heads for tail in _expand_braces(pattern[match.end() :])]


def _exists(url: str) -> bool:
  fs, path = fsspec.core.url_to_fs(url)
  return fs.isfile(path)


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
  return 'file' in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _index(shard: str, wanted: _Wanted, index_dir) -> _Index:
  """Returns the shard's index, from its file if that is fresh, else from the tar headers."""
  fs, path = fsspec.core.url_to_fs(shard)
  info = fs.info(path)
  # File systems have no common name for the time of the last change.
  stamps = ('mtime', 'LastModified', 'updated', 'ETag', 'created')
  changed = next((info[key] for key in stamps if key in info), None)
  state = json.dumps(['dpcap tar index 1', info['size'], str(changed), wanted])
  files = _index_files(fs, path, index_dir)
  for file in files:
    kept = _load_meta(file)
    if kept and kept['state'] == state:
      return _Index(str(file), kept['count'], tuple(kept['labels']), kept['problem'], state)

  logging.info('indexing %s', shard)
  with fs.open(path, 'rb') as file:
    table, problem = _scan(file, info['size'], wanted)
    labels = _collect_labels(file, table, wanted.label_key) if wanted.label_key else ()
  meta = {'state': state, 'count': len(table), 'labels': labels, 'problem': problem}
  for file in files:
    try:
      _save(file, table, meta)
      return _Index(str(file), len(table), labels, problem, state)
    except OSError as error:
      reason = error
  raise UserError(
    f'index of shard {shard}: cannot be written to {files[-1]} ({reason});'
    f' expected a writable index_dir'
  )


def _index_files(fs, path: str, index_dir) -> list[pathlib.Path]:
  """The index files to try, in this order."""
  # Shards of different folders share names, so where they meet a hash of the URL tells them apart.
  url = fs.unstrip_protocol(path)
  name = f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{os.path.basename(path)}.index.npz'
  if index_dir is not None:
    return [pathlib.Path(index_dir) / name]
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  cached = pathlib.Path(cache) / 'dpcap' / 'tar_index' / name
  if not _is_local(fs):
    return [cached]
  folder = pathlib.Path(path).parent
  # Root may write anywhere: a folder without write permission is left alone all the same.
  writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
  return [pathlib.Path(f'{path}.index.npz'), cached] if writable else [cached]


def _scan(file, shard_size: int, wanted: _Wanted) -> tuple[np.ndarray, str]:
  """Reads the headers of a tar.

  Returns:
    int64 (samples, 3, 2): offset and size of each of `_PARTS`, size 0 where a sample lacks the
    part; and what is wrong with the shard, or ''.
  """
  rows, last_key, problem, end = [], None, '', 0
  try:
    with tarfile.open(fileobj=file, mode='r:') as tar:
      for member in tar:
        end = member.offset_data + member.size
        match = _MEMBER_NAME.match(member.name) if member.isreg() else None
        if not match or end > shard_size:
          continue
        key, extension = match.group(1), match.group(2).lower()
        if key != last_key:
          rows.append([(0, 0)] * len(_PARTS))
          last_key = key
        part = _part(extension, wanted)
        if part is not None and not rows[-1][part][1]:
          rows[-1][part] = (member.offset_data, member.size)
    end += -end % _TAR_BLOCK
    file.seek(end)
    if file.read(_TAR_BLOCK).strip(b'\0'):
      # tarfile takes a damaged header for the end of the archive.
      problem = f'shard is damaged at byte {end} of {shard_size}'
  except tarfile.ReadError as error:
    if end:
      problem = f'shard is truncated: it has {shard_size} bytes, expected at least {end}'
    else:
      problem = f'shard left out: not an uncompressed tar file ({error})'
  if rows and problem:
    # The sample at the break may lack what came after; it stays if it has all that is read.
    image, caption, fields = (size for _, size in rows[-1])
    if not image or not (caption if wanted.caption_key else fields):
      rows.pop()
    problem += f'; its first {len(rows)} samples are kept'
  if not rows:
    problem = problem or 'shard left out: it holds no samples'
  return np.array(rows, np.int64).reshape(-1, len(_PARTS), 2), problem


def _part(extension: str, wanted: _Wanted) -> int | None:
  if extension in wanted.image_keys:
    return _PARTS.index('image')
  if extension == wanted.caption_key:
    return _PARTS.index('caption')
  return _PARTS.index('json') if extension == 'json' else None


def _collect_labels(file, table: np.ndarray, label_key: str) -> tuple[str, ...]:
  labels = set()
  for offset, size in table[:, _PARTS.index('json')]:
    file.seek(offset)
    try:
      label = _parse_json(file.read(size)).get(label_key)
    except BadRecord:
      continue  # found again, and counted, when it is drawn
    if label is not None:
      labels.add(str(label))
  return tuple(sorted(labels))


def _save(file: pathlib.Path, table: np.ndarray, meta: dict[str, Any]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  # Another process may index the same shard, or read this file: it appears whole or not at all.
  handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f'.{file.name}.')
  try:
    with os.fdopen(handle, 'wb') as out:
      np.savez(out, table=table, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
    os.chmod(temporary, 0o644)
    os.replace(temporary, file)
  except BaseException:
    os.unlink(temporary)
    raise
  _load_table.cache_clear()


def _load_meta(file: pathlib.Path) -> dict[str, Any] | None:
  try:
    with np.load(file) as arrays:
      return json.loads(arrays['meta'].tobytes())
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None  # not there, or not ours: it is made again


@functools.lru_cache(maxsize=256)
def _load_table(file: str) -> np.ndarray:
  """The table of `_scan`. At 234M pairs all of them take 11 GB, so a worker keeps only some."""
  with np.load(file) as arrays:
    return arrays['table']


def _read_parts(shard: str, row: np.ndarray, wanted: Sequence[bool]) -> list[bytes | None]:
  """Reads the wanted `_PARTS` of one sample, neighbours in one request; None for a missing part.

  Args:
    shard: its URL.
    row: (3, 2), offset and size of each part.
    wanted: which parts to read.

  Raises:
    BadRecord: the shard is shorter than it was when it was indexed.
  """
  spans = sorted(
    (int(offset), int(offset + size), part)
    for part, (offset, size) in enumerate(row)
    if wanted[part] and size
  )
  reads: list[list[tuple[int, int, int]]] = []
  for span in spans:
    if reads and span[0] - reads[-1][-1][1] <= _READ_GAP:
      reads[-1].append(span)
    else:
      reads.append([span])
  fs, path = fsspec.core.url_to_fs(shard)
  parts: list[bytes | None] = [None] * len(_PARTS)
  for read in reads:
    start, stop = read[0][0], read[-1][1]
    data = fs.cat_file(path, start=start, end=stop)
    if len(data) != stop - start:
      raise BadRecord(f'{shard} ends before byte {stop}: it was cut after it was indexed')
    for first, last, part in read:
      parts[part] = data[first - start : last - start]
  return parts


def _parse_json(data: bytes | None) -> dict[str, Any]:
  try:
    fields = json.loads(data) if data else {}
  except ValueError as error:
    raise BadRecord(f'json member is damaged: {error}') from error
  if not isinstance(fields, dict):
    raise BadRecord(f'json member is a {type(fields).__name__}, not an object')
  return fields
