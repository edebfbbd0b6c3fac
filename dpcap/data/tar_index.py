"""The index of a tar shard: where each sample's members lie, in one small file per shard.

Made once from the tar headers; after that any sample is one ranged read. An index lies beside its
shard, or in a folder of indexes (local, or a URL that fsspec opens), or where neither can be: in
the user's cache folder. It is made again when the shard changes or other members are asked for.

A sample is what has an image: consecutive members KEY.EXT of one key, as webdataset has it, the key
ending at the first dot of the file name. The same member once more begins another sample of that
key. Keys without an image are strays, a README or the text of an image that was lost: they are
told, and are no samples.
"""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import glob
import hashlib
import io
import json
import os
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
import numpy as np
from absl import logging

from dpcap.data.byte_ranges import (
  StoreError,
  ask,
  describe,
  find_store,
  is_local,
  read_file,
  scan,
)
from dpcap.data.contents import HEAD, checksum, image_ids
from dpcap.data.source import BadRecord, check_label, parse_fields
from dpcap.data.tar_headers import BLOCK, TarDamage, iterate_files
from dpcap.errors import UserError

# Shards indexed at a time where storage, not the processor, sets the pace.
THREADS = 32
PARTS = ('image', 'caption', 'json')
_BRACE_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_FORMAT = 'dpcap tar index 4'
# Blocks and sizes are stored in 32 bits: 28 bytes a sample, 6.5 GB for LAION's 234 million.
_LIMIT = 2**32
_EXTENSIONS_TOLD = 6
# A row of what is found: block and size of each part, bits of the parts there, a checksum.
_HAS = 2 * len(PARTS)
_CHECKSUM = _HAS + 1
_WIDTH = _CHECKSUM + 1


class Wanted(NamedTuple):
  """What an index has to hold; another answer makes it stale.

  Attributes:
    image_keys: extensions of image members.
    caption_key: extension of the caption member, '' where captions come from the json.
    label_key: field of the json whose values are collected, or None.
  """

  image_keys: tuple[str, ...]
  caption_key: str
  label_key: str | None


class Counts(NamedTuple):
  """What lies in a shard, or in several.

  Attributes:
    images: samples whose image holds a byte.
    captions: samples with a caption member, or with a json where captions come from it.
    both: samples with both.
    repeated: samples whose key another one has.
    strays: keys without an image, which are no samples.
    extensions: the commonest, with their numbers of members.
  """

  images: int = 0
  captions: int = 0
  both: int = 0
  repeated: int = 0
  strays: int = 0
  extensions: Mapping[str, int] = {}

  def listed_extensions(self) -> str:
    """The extensions for people."""
    return ', '.join(f'{key} ({count:,})' for key, count in self.extensions.items()) or 'none'


def total(counts: Iterable[Counts]) -> Counts:
  """The counts of several shards together."""
  *numbers, extensions = zip(*(Counts(), *counts))
  together = sum(map(collections.Counter, extensions), collections.Counter())
  return Counts(*map(sum, numbers), dict(together.most_common(_EXTENSIONS_TOLD)))


class Index(NamedTuple):
  """What is remembered of a shard's index; the offsets themselves stay in the file.

  Attributes:
    shard: path or URL.
    file: path or URL of the index.
    count: samples, 0 where there is a problem.
    size: of the shard, bytes.
    labels: values of `Wanted.label_key` found, sorted.
    problem: '', or why the shard is left out.
    state: see `state_of`.
    counts: what it holds.
    new: whether the shard was read for it now.
  """

  shard: str
  file: str
  count: int
  size: int
  labels: tuple[str, ...]
  problem: str
  state: str
  counts: Counts = Counts()
  new: bool = False


def find_shards(path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
  """Expands folders, globs and brace ranges, or a list of them, into the sorted files of each.

  Raises:
    UserError: no shard matches, a named one is missing, or a URL cannot be opened here.
    StoreError: the store does not tell.
  """
  shards = []
  for pattern in [path] if isinstance(path, (str, os.PathLike)) else path:
    pattern = os.fspath(pattern)
    named = _expand_braces(pattern)
    if named != [pattern]:
      with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        missing = [name for name, exists in zip(named, pool.map(_exists, named)) if not exists]
      if missing:
        raise UserError(
          f'data path {pattern}: {len(missing)} of {len(named)} shards missing, first {missing[0]}'
        )
      shards += named
      continue
    fs, root = find_store(pattern)
    found, problem = ask(lambda: _find(fs, root), pattern, 'which shards there are')
    if not found:
      raise UserError(f'data path {pattern}: {problem}')
    shards += found if is_local(pattern) else map(fs.unstrip_protocol, found)
  if not shards:
    raise UserError('data path is an empty list; expected at least one folder, file or pattern')
  return shards


def _find(fs: fsspec.AbstractFileSystem, root: str) -> tuple[list[str], str]:
  """The shards of a folder, file or glob, sorted, and what is wrong where there are none."""
  if fs.isdir(root):
    found = sorted(fs.glob(f'{glob.escape(root.rstrip("/"))}/*.tar'))
    return found, 'no shard found; expected *.tar files in this folder'
  if fs.isfile(root):
    return [root], ''
  if glob.has_magic(root):
    return sorted(fs.glob(root)), 'no shard found; expected tar files that match this pattern'
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    fs.info(root)  # what was not found may not have been reached
  expected = 'a folder of *.tar, a file, a glob or a range {00000..00041}.tar'
  return [], f'does not exist; expected {expected}'


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
  fs, path = find_store(url)

  def is_file():
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      return fs.info(path)['type'] == 'file'
    return False

  return ask(is_file, url, 'whether it is there')


def index_shard(shard: str, wanted: Wanted, index_dir: str | os.PathLike | None = None) -> Index:
  """The shard's index, from its file if that is fresh, else made from the tar headers.

  A shard that is damaged, holds no sample or has its members in an order that no sample can be read
  from has an index too, which says so: it is not read again.

  Args:
    shard: path or URL.
    wanted: what the index has to hold.
    index_dir: folder of the index files, a path or URL; None: beside the shard or in the cache.

  Raises:
    StoreError: the shard cannot be read.
    UserError: the index cannot be written anywhere.
  """
  size, digest = state_of(shard, wanted)
  files = index_files(shard, wanted, index_dir)
  for file in files:
    kept = _load(file)
    if not kept or kept[0]['state'] != digest:
      continue
    meta = kept[0]
    if wanted.label_key in (None, meta['label_key']):
      labels, counts = tuple(meta['labels']), Counts(**meta['counts'])
      return Index(shard, file, meta['count'], size, labels, meta['problem'], digest, counts)

  logging.info('indexing %s', shard)
  problem = ''
  try:
    table, checksums, labels, counts = _read_headers(shard, size, wanted)
  except TarDamage as damage:
    table, checksums, labels = np.zeros((0, len(PARTS), 2), np.uint32), np.zeros(0, np.uint32), ()
    problem, counts = str(damage), Counts()
  if not problem and not len(table):
    problem = (
      f'holds no samples: no file KEY.{wanted.image_keys[0]}'
      f'{" or with another of image_keys" if wanted.image_keys[1:] else ""}; a KEY ends at the'
      f' first dot, and the extensions there are: {counts.listed_extensions()}'
    )
  meta = {'state': digest, 'count': len(table), 'label_key': wanted.label_key}
  meta |= {'labels': labels, 'problem': problem, 'counts': counts._asdict()}
  for file in files:
    try:
      _save(file, meta, table=table, checksums=checksums)
      return Index(shard, file, len(table), size, labels, problem, digest, counts, new=True)
    except OSError as error:
      reason = error
  raise UserError(
    f'index of shard {shard}: cannot be written to {files[-1]} ({reason});'
    f' expected a writable index_dir'
  )


def try_index_shard(
  shard: str, wanted: Wanted, index_dir: str | os.PathLike | None = None
) -> Index:
  """As `index_shard`, but a shard that cannot be read is a problem like damage, for now.

  Raises:
    UserError: the index cannot be written anywhere.
  """
  try:
    return index_shard(shard, wanted, index_dir)
  except StoreError as error:
    return Index(shard, '', 0, 0, (), f'cannot be read: {error.strerror}', '')


def state_of(shard: str, wanted: Wanted) -> tuple[int, str]:
  """Size of a shard in bytes, and a digest of size, time and the members wanted.

  The labels are left out: a source that collects them and one that does not share an index.

  Raises:
    StoreError: it cannot be read.
  """
  size, changed = describe(shard)
  state = json.dumps([_FORMAT, size, changed, wanted.image_keys, wanted.caption_key])
  return size, hashlib.sha256(state.encode()).hexdigest()[:16]


def index_files(shard: str, wanted: Wanted, index_dir: str | os.PathLike | None) -> list[str]:
  """The paths or URLs to try for the index of a shard, in this order."""
  fs, path = find_store(shard)
  # Runs that want other members of the same shards do not overwrite each other's indexes.
  members = hashlib.sha256(json.dumps(wanted[:2]).encode()).hexdigest()[:8]
  # Shards of different folders share names, so where they meet a hash of the URL tells them apart.
  url = fs.unstrip_protocol(path)
  name = f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{os.path.basename(path)}.{members}.npz'
  if index_dir is not None:
    return [f'{os.fspath(index_dir).rstrip("/")}/{name}']
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  cached = f'{cache}/dpcap/tar_index/{name}'
  if not is_local(shard):
    return [cached]
  folder = pathlib.Path(path).parent
  # Root may write anywhere: a folder without write permission is left alone all the same.
  writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
  return [f'{path}.{members}.npz', cached] if writable else [cached]


def _read_headers(
  shard: str, shard_size: int, wanted: Wanted
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], Counts]:
  """The table of `load_table`, checksums of the images (samples,) uint32, labels found, counts.

  Raises:
    TarDamage: the archive is damaged, or members of one key lie apart.
  """
  if shard_size > BLOCK * _LIMIT:
    raise TarDamage(f'has {shard_size} bytes, more than {BLOCK * _LIMIT}')
  read = scan(shard)
  part_of = {key: 0 for key in wanted.image_keys} | {'json': 2}
  if wanted.caption_key:
    part_of[wanted.caption_key] = 1
  # Of every group of members with one key: where its parts lie, which it has (bits), a checksum.
  keys, rows, labels, number_of = [], [], {}, {}
  key_before, row, held = None, [], []
  for name, offset, size in iterate_files(read, shard_size):
    # webdataset's rule: the key ends at the first dot of the file name.
    start = name.rfind('/') + 1
    dot = name.find('.', start)
    if dot <= start or dot + 1 == len(name):
      continue
    key, extension = name[:dot], name[dot + 1 :]
    try:
      number_of[extension] += 1
    except KeyError:
      number_of[extension] = 1
      part_of[extension] = part_of.get(extension.lower())
    if key != key_before or extension in held:
      key_before, row, held = key, [0] * _WIDTH, []
      keys.append(key)
      rows.append(row)
    part = part_of[extension]
    if part is None or row[_HAS] & 1 << part or size >= _LIMIT:
      continue
    held.append(extension)
    row[_HAS] |= 1 << part
    row[2 * part : 2 * part + 2] = offset // BLOCK, size
    if part == 0:
      row[_CHECKSUM] = checksum(read(offset, offset + min(size, HEAD)))
    if part == 2 and wanted.label_key:
      label = _label(read(offset, offset + size), wanted.label_key)
      if label is not None:
        labels[len(keys) - 1] = str(label)
  groups = np.array(rows, np.uint32).reshape(-1, _WIDTH)
  is_sample = groups[:, _HAS] & 1 > 0
  table = groups[is_sample, :_HAS].reshape(-1, len(PARTS), 2)
  has_image, has_caption = (table[:, part, 1] > 0 for part in (0, 1 if wanted.caption_key else 2))
  extensions = collections.Counter()
  for extension, number in number_of.items():
    extensions[extension.lower()] += number
  counts = Counts(
    images=int(has_image.sum()),
    captions=int(has_caption.sum()),
    both=int((has_image & has_caption).sum()),
    repeated=_count_repeated(keys, groups[:, _HAS].tolist()),
    strays=len(keys) - len(table),
    extensions=dict(extensions.most_common(_EXTENSIONS_TOLD)),
  )
  found = {label for group, label in labels.items() if is_sample[group]}
  return table, groups[is_sample, _CHECKSUM], tuple(sorted(found)), counts


def _count_repeated(keys: Sequence[str], parts: Sequence[int]) -> int:
  """How many samples have the key of one before.

  Args:
    keys: of groups of members, in order.
    parts: what each group has, as bits.

  Raises:
    TarDamage: parts of a sample lie apart, as where a tar was sorted by extension: they would be
      taken for samples without a caption, and captions without a sample.
  """
  before, repeated = {}, 0
  if len(set(keys)) == len(keys):
    return 0
  for key, bits in zip(keys, parts):
    if key not in before:
      before[key] = bits
      continue
    others = before[key]
    if others and bits and not others & bits and (others | bits) & 1:
      raise TarDamage(
        f'files of one sample lie apart, those of key {key!r} first; make the tar with'
        ' `tar --sort=name`, which puts them together'
      )
    before[key] = others | bits
    repeated += bits & 1
  return repeated


def _label(content: bytes, key: str) -> str | int | float | None:
  try:
    return check_label(parse_fields(content).get(key))
  except BadRecord:
    return None  # found again, and counted, when it is drawn


def _save(file: str, meta: dict[str, Any], **arrays: np.ndarray) -> None:
  """Another process may index the same shard, or read this file: it appears whole or not at all."""
  out = io.BytesIO()
  np.savez(out, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
  write_whole(file, out.getvalue())
  load_table.cache_clear()


def write_whole(file: str, content: bytes) -> None:
  """Writes a local file under another name first; object stores never show half an object.

  Raises:
    OSError: it cannot be written.
  """
  fs, path = find_store(file)
  if not is_local(file):
    ask(lambda: fs.pipe_file(path, content), file, 'that it was written')
    return
  folder = os.path.dirname(path)
  os.makedirs(folder, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=folder, prefix=f'.{os.path.basename(path)}.')
  try:
    with os.fdopen(handle, 'wb') as out:
      out.write(content)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def _load(file: str) -> tuple[dict[str, Any], Mapping[str, np.ndarray]] | None:
  """What an index file says, and its arrays, read on access; None: not there, or not ours."""
  try:
    if is_local(file):
      with open(find_store(file)[1], 'rb') as opened:
        content = opened.read()
    else:
      content = read_file(file)
    arrays = np.load(io.BytesIO(content))
    meta = json.loads(arrays['meta'].tobytes())
    known = ('state', 'count', 'label_key', 'labels', 'problem', 'counts')
    meta = {key: meta[key] for key in known}
    return meta, arrays
  except FileNotFoundError:
    return None
  except StoreError as error:
    if isinstance(error.__cause__, FileNotFoundError):
      return None
    raise
  except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile):
    return None


@functools.lru_cache(maxsize=256)
def load_table(file: str, state: str) -> np.ndarray:
  """Where the samples of a shard lie; kept for the shards that were read last.

  Args:
    file: of the index.
    state: of the `Index`.

  Returns:
    uint32 (samples, 3, 2): first block of 512 bytes, and size in bytes, of each of PARTS; size 0
    where a sample lacks the part.

  Raises:
    StoreError: the index is gone, or is that of another state of the shard.
  """
  return _arrays(file, state)['table']


def load_image_ids(file: str, state: str) -> np.ndarray:
  """What the images of a shard are known by, uint64 (samples,); see `contents.image_ids`.

  Args:
    file: of the index.
    state: of the `Index`.

  Raises:
    StoreError: as `load_table`.
  """
  arrays = _arrays(file, state)
  return image_ids(arrays['table'][:, 0, 1], arrays['checksums'])


def _arrays(file: str, state: str) -> Mapping[str, np.ndarray]:
  loaded = _load(file)
  if loaded is None:
    raise StoreError(errno.ENOENT, 'this index of a shard is gone; it was there at start', file)
  if loaded[0]['state'] != state:
    raise StoreError(errno.ESTALE, 'this index of a shard was made again since the start', file)
  return loaded[1]
