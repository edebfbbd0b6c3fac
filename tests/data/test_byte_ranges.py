"""A store that is slow, fails now and then, or for good."""

import pickle
import sys
import threading
import time

import fsspec
import pytest

from dpcap import data
from dpcap.data import byte_ranges, tar_manifest
from dpcap.data.byte_ranges import Span, StoreError, read, read_spans, scan
from dpcap.data.tar_index import Wanted
from dpcap.errors import UserError

_CONTENT = bytes(range(256)) * 2**10
_URL = 'memory://ranges/a'


class Store:
  """What happens to the requests of the memory file system.

  Attributes:
    requests: (start, stop) of each, in the order of arrival.
    faults: what to do to the next requests: an exception to raise, or how many bytes to cut.
    delay_s: of each request.
    most_at_once: requests under way at the same time.
  """

  def __init__(self):
    self.requests, self.faults, self.delay_s = [], [], 0.0
    self.most_at_once, self._under_way, self._lock = 0, 0, threading.Lock()

  def cat_file(self, fs, path, start=None, end=None):
    with self._lock:
      self.requests.append((start, end))
      self._under_way += 1
      self.most_at_once = max(self.most_at_once, self._under_way)
      fault = self.faults.pop(0) if self.faults else 0
    time.sleep(self.delay_s)
    with self._lock:
      self._under_way -= 1
    if isinstance(fault, Exception):
      raise fault
    data = fs.store[path].getvalue()[start:end]
    return data[: len(data) - fault]


@pytest.fixture
def store(monkeypatch):
  fs = fsspec.filesystem('memory')
  fs.pipe_file('/ranges/a', _CONTENT)
  fs.pipe_file('/ranges/b', _CONTENT[::-1])
  store = Store()
  cat_file = lambda fs, path, start=None, end=None: store.cat_file(fs, path, start, end)
  monkeypatch.setattr(type(fs), 'cat_file', cat_file)
  monkeypatch.setattr(byte_ranges, '_FIRST_WAIT_S', 1e-4)
  yield store
  fs.rm('/ranges', recursive=True)


def test_a_read_that_fails_or_comes_short_is_tried_again(store):
  store.faults = [ConnectionError('reset'), 3, TimeoutError(), 100, ValueError('odd')]
  assert read(Span(_URL, 100, 300)) == _CONTENT[100:300]
  assert store.requests == [(100, 300)] * 6


@pytest.mark.parametrize('fault, reason', [(1, '199 bytes'), (ConnectionError('reset'), 'reset')])
def test_a_store_that_keeps_failing_is_named(store, fault, reason):
  store.faults = [fault] * 100
  with pytest.raises(StoreError, match=f'6 attempts.*{reason}') as error:
    read(Span(_URL, 100, 300))
  assert len(store.requests) == 6 and error.value.filename == _URL
  copy = pickle.loads(pickle.dumps(error.value))  # as it comes out of a worker process
  assert str(copy) == str(error.value) and isinstance(copy, StoreError)


@pytest.mark.parametrize('fault', [FileNotFoundError('gone'), PermissionError('denied')])
def test_what_another_attempt_does_not_change_is_not_tried_again(store, fault):
  store.faults = [fault]
  with pytest.raises(StoreError, match=type(fault).__name__):
    read(Span(_URL, 0, 1))
  assert len(store.requests) == 1


def test_spans_come_in_the_order_asked_for_in_few_requests(store, tmp_path):
  (tmp_path / 'c').write_bytes(_CONTENT[7:])
  local = str(tmp_path / 'c')
  spans = [
    Span(_URL, 100_300, 100_400),
    Span('memory://ranges/b', 5, 10),
    Span(local, 3, 9),
    Span(_URL, 100_000, 100_200),
    Span(_URL, 0, 10),
    Span('memory://ranges/b', 5, 10),
    Span(_URL, 100_350, 100_360),
  ]
  expected = [
    (_CONTENT[::-1] if s.url.endswith('b') else _CONTENT[7:] if s.url == local else _CONTENT)
    for s in spans
  ]
  found = list(read_spans(spans))
  assert found == [content[s.start : s.stop] for s, content in zip(spans, expected)]
  assert sorted(store.requests) == [(0, 10), (5, 10), (100_000, 100_400)]


def test_requests_run_side_by_side_and_not_too_far_ahead(store, monkeypatch):
  monkeypatch.setattr(byte_ranges, '_BYTES_AHEAD', 1000)
  monkeypatch.setattr(byte_ranges, '_GAP', 0)
  store.delay_s = 0.01
  contents = read_spans([Span(_URL, 1000 * i, 1000 * i + 100) for i in range(40)])
  next(contents)
  assert len(store.requests) <= 10
  assert len(list(contents)) == 39 and 5 <= store.most_at_once <= 11
  with pytest.raises(StoreError, match='b'):
    store.faults = [FileNotFoundError('gone')] * 3
    list(read_spans([Span('memory://ranges/b', 0, 9), Span(_URL, 0, 9)]))


def test_a_scan_reads_remote_files_in_blocks_ahead(store, monkeypatch):
  monkeypatch.setattr(byte_ranges, '_BLOCK', 1000)
  read_at = scan(_URL)
  for start, stop in [(0, 512), (512, 1024), (5100, 5110), (5100, 8300), (262_000, 262_144)]:
    assert read_at(start, stop) == _CONTENT[start:stop]
  assert all(start % 1000 == 0 for start, _ in store.requests)
  assert 9 <= len(set(store.requests)) == len(store.requests) <= 4 + 6 + 1


def test_local_files_are_not_waited_for(tmp_path):
  (tmp_path / 'a').write_bytes(b'12345')
  path = str(tmp_path / 'a')
  assert read(Span(path, 1, 4)) == b'234' == read(Span(f'file://{path}', 1, 4))
  with pytest.raises(StoreError, match='cut') as error:
    read(Span(path, 1, 6))
  assert error.value.filename == path
  with pytest.raises(StoreError, match='No such file'):
    read(Span(str(tmp_path / 'b'), 1, 6))


@pytest.fixture(name='no_packages')
def _no_packages(monkeypatch):
  """As where no package of a store is installed, whatever is here."""
  for module in ('gcsfs', 's3fs', 'aiohttp'):
    monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.delitem(sys.modules, 'fsspec.implementations.http', raising=False)
  registry = sys.modules['fsspec.registry']
  for protocol in ('gs', 's3', 'https'):
    monkeypatch.delitem(registry._registry, protocol, raising=False)


@pytest.mark.parametrize(
  'url, reason',
  [('gs', 'gcsfs'), ('s3', 's3fs'), ('https', 'aiohttp'), ('elsewhere', 'not known: elsewhere')],
)
def test_a_url_that_cannot_be_opened_here_is_told_in_one_line(no_packages, tmp_path, url, reason):
  (tmp_path / 'a.tar').write_bytes(bytes(1024))
  bucket = f'{url}://bucket'
  for options in (
    {'path': f'{bucket}/shards'},
    {'path': f'{bucket}/{{0..3}}.tar'},
    {'path': f'{bucket}/*.tar'},
    {'path': f'{bucket}/manifest.json'},
    {'path': str(tmp_path), 'index_dir': f'{bucket}/index'},
  ):
    with pytest.raises(UserError, match=f'{bucket}.*: this kind of URL .*{reason}') as error:
      data.make_source('tar_shards', image_size=8, **options)
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match=reason):
    tar_manifest.write(f'{bucket}/manifest.json', [], Wanted(('jpg',), 'txt', None))


def test_a_store_that_does_not_tell_what_it_has_ends_in_one_line(store, monkeypatch):
  def fail(*_, **__):
    raise ConnectionError('no route to host')

  monkeypatch.setattr(type(fsspec.filesystem('memory')), 'info', fail)
  for path in ('memory://ranges', 'memory://ranges/{0..1}.tar'):
    with pytest.raises(UserError, match='memory://ranges.*no route to host'):
      data.make_source('tar_shards', image_size=8, path=path)
