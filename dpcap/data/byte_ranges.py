"""Reading ranges of bytes, from local files or from any store that fsspec opens.

A store that fails is not a damaged record: reads are tried again, and what still fails is an
error that names the file and stops the run, so that no example is lost without a word.
"""

import collections
import concurrent.futures
import errno
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import fsspec

from dpcap.errors import UserError

# The waits between six attempts add up to about 15 s: a store that restarts is back by then.
ATTEMPTS = 6
_FIRST_WAIT_S = 0.5
# Object stores take some 50 ms to answer, whatever is asked: that is worth this many bytes.
_GAP = 2**16
_LARGEST_READ = 2**23
_BYTES_AHEAD = 2**26
# Of a scan, which may be one of many.
_BLOCK = 2**22
_BLOCKS_AHEAD = 2
_THREADS = 64


class StoreError(OSError):
  """The storage failed, or no longer holds what it held; `filename` says which file."""


class Span(NamedTuple):
  """Bytes `start` to `stop` (left out) of a file."""

  url: str
  start: int
  stop: int


def is_local(url: str) -> bool:
  """Whether a path or URL is a file of this machine's file systems."""
  return fsspec.utils.get_protocol(url) in ('file', 'local')


def find_store(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The store that a path or URL names, and the path in it.

  Raises:
    UserError: the kind of store is unknown, or the package that opens it is not installed.
  """
  try:
    return fsspec.core.url_to_fs(url)
  except Exception as error:  # what packages of stores raise is no closed list
    raise UserError(f'{url}: this kind of URL cannot be opened here ({error})') from error


def real_place(url: str) -> str:
  """A local path without links, or a URL: the same for a file however it was named."""
  fs, path = find_store(url)
  return os.path.realpath(path) if is_local(url) else fs.unstrip_protocol(path)


def read(span: Span) -> bytes:
  """All bytes of a span; remote ones are asked for up to ATTEMPTS times.

  Raises:
    StoreError: they cannot be read, or the file ends before them.
  """
  return _open(span.url)(span.start, span.stop)


def read_file(url: str) -> bytes:
  """The whole of a small file.

  Raises:
    StoreError: as `read`.
  """
  fs, path = find_store(url)
  return ask(lambda: fs.cat_file(path), url, 'its content')


def describe(url: str) -> tuple[int, str]:
  """Size of a file in bytes, and what the store says of its last change.

  Raises:
    StoreError: as `read`.
  """
  fs, path = find_store(url)
  info = ask(lambda: fs.info(path), url, 'its size')
  # File systems have no common name for the time of the last change.
  stamps = ('mtime', 'LastModified', 'updated', 'ETag', 'created')
  return info['size'], str(next((info[key] for key in stamps if key in info), None))


def ask(fetch: Callable[[], Any], url: str, what: str) -> Any:
  """What `fetch` returns, tried ATTEMPTS times.

  Args:
    fetch: asks a store.
    url: what it asks about.
    what: it wants to know.

  Raises:
    StoreError: it fails every time, or for a reason that another attempt does not remove.
  """
  for attempt in range(ATTEMPTS):
    if attempt:
      # Spread out, or the workers that failed together come back together.
      time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.7, 1.3))
    try:
      return fetch()
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
      raise StoreError(error.errno or errno.EIO, f'{type(error).__name__}: {error}', url) from error
    except MemoryError:
      raise
    except Exception as error:  # what stores raise is no closed list
      reason = f'{type(error).__name__}: {error}'
  raise StoreError(errno.EIO, f'{what} did not come in {ATTEMPTS} attempts, last: {reason}', url)


def read_spans(spans: Sequence[Span]) -> Iterator[bytes]:
  """The bytes of each span, in the order given; remote ones are fetched ahead in threads.

  Remote spans that lie close together are fetched by one request; requests go out in the order of
  files and offsets, so spans that ascend are held in memory for the shortest time.

  Raises:
    StoreError: as `read`.
  """
  requests, request_of = _merge(span for span in spans if not is_local(span.url))
  users = collections.Counter(request_of[span] for span in spans if span in request_of)
  pending: dict[int, concurrent.futures.Future] = {}
  sent = bytes_ahead = 0
  try:
    for span in spans:
      if span not in request_of:
        yield read(span)
        continue
      number = request_of[span]
      while sent < len(requests) and (sent <= number or bytes_ahead < _BYTES_AHEAD):
        pending[sent] = _pool().submit(read, requests[sent])
        bytes_ahead += requests[sent].stop - requests[sent].start
        sent += 1
      request = requests[number]
      data = pending[number].result()
      users[number] -= 1
      if not users[number]:
        del pending[number]
        bytes_ahead -= request.stop - request.start
      yield data[span.start - request.start : span.stop - request.start]
  finally:
    for future in pending.values():
      future.cancel()


def scan(url: str) -> Callable[[int, int], bytes]:
  """A function (start, stop) -> bytes for reading a file from front to end with leaps.

  Remote files are fetched in large blocks, some ahead of what was asked for. Bytes behind the end
  must not be asked for.
  """
  # Not an open file of before: another may bear its name by now.
  return _LocalFile(url).read if is_local(url) else _Blocks(url).read


def forget_open_files() -> None:
  """From here on files are opened by their names again; those in use stay open until then."""
  _open.cache_clear()


def _merge(spans) -> tuple[list[Span], dict[Span, int]]:
  """Requests that cover all spans, ascending, and the number of the request that covers each."""
  requests, request_of = [], {}
  for span in sorted(set(spans)):
    last = requests[-1] if requests else None
    if (
      last is not None
      and last.url == span.url
      and span.start - last.stop <= _GAP
      and max(span.stop, last.stop) - last.start <= _LARGEST_READ
    ):
      requests[-1] = last._replace(stop=max(span.stop, last.stop))
    else:
      requests.append(span)
    request_of[span] = len(requests) - 1
  return requests, request_of


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix='byte-ranges')


# Opening a file costs more than reading a record of it; a batch visits its shards in order.
@functools.lru_cache(maxsize=64)
def _open(url: str) -> Callable[[int, int], bytes]:
  if is_local(url):
    return _LocalFile(url).read
  return functools.partial(_read_remote, *find_store(url), url)


class _LocalFile:
  """An open file, closed when nobody holds it any more."""

  def __init__(self, url: str):
    self._path, self._descriptor = find_store(url)[1], -1
    try:
      self._descriptor = os.open(self._path, os.O_RDONLY)
    except OSError as error:
      raise StoreError(error.errno, error.strerror, self._path) from error

  def __del__(self):
    if self._descriptor >= 0:
      os.close(self._descriptor)

  def read(self, start: int, stop: int) -> bytes:
    try:
      data = os.pread(self._descriptor, stop - start, start)
    except OSError as error:
      raise StoreError(error.errno, error.strerror, self._path) from error
    if len(data) != stop - start:
      raise StoreError(errno.EIO, f'ends before byte {stop}: it was cut', self._path)
    return data


def _read_remote(fs: fsspec.AbstractFileSystem, path: str, url: str, start: int, stop: int):
  def fetch():
    data = fs.cat_file(path, start=start, end=stop)
    if len(data) != stop - start:
      raise OSError(f'{len(data)} bytes came')
    return data

  return ask(fetch, url, f'bytes {start} to {stop}')


class _Blocks:
  """A remote file in blocks; the one in use and those after it are held or on their way."""

  def __init__(self, url: str):
    self._url, self._size = url, describe(url)[0]
    self._blocks: dict[int, concurrent.futures.Future] = {}

  def read(self, start: int, stop: int) -> bytes:
    first, last = start // _BLOCK, max(start, stop - 1) // _BLOCK
    ends = min(last + _BLOCKS_AHEAD, (self._size - 1) // _BLOCK)
    for number in [number for number in self._blocks if number < first]:
      self._blocks.pop(number).cancel()
    for number in range(first, ends + 1):
      if number not in self._blocks:
        begin = number * _BLOCK
        span = Span(self._url, begin, min(begin + _BLOCK, self._size))
        self._blocks[number] = _pool().submit(read, span)
    held = b''.join(self._blocks[number].result() for number in range(first, last + 1))
    return held[start - first * _BLOCK : stop - first * _BLOCK]
