"""Indexing ahead of a run: what is left out, what is kept, what a second call does."""

import contextlib
import io
import json
import os
import pathlib
import tarfile
import time

import fsspec
import pytest

from dpcap import data
from dpcap.config import source_config
from dpcap.data import tar_index
from dpcap.data.tar_shards import TarShards
from tools import index_shards


def shard(numbers) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w') as tar:
    for i in numbers:
      for name, data in [(f'{i}.jpg', b'image'), (f'{i}.txt', b'caption %d' % i)]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  return out.getvalue()


@pytest.fixture
def folder(tmp_path):
  """Two good shards, of 3 and 4 samples, and a damaged one."""
  folder = tmp_path / 'shards'
  folder.mkdir()
  (folder / 'a.tar').write_bytes(shard(range(3)))
  (folder / 'b.tar').write_bytes(shard(range(3, 6))[:2000])
  (folder / 'c.tar').write_bytes(shard(range(6, 10)))
  return folder


def run(capsys, *arguments) -> tuple[int, dict, str]:
  status = index_shards.main([str(argument) for argument in arguments])
  out, errors = capsys.readouterr()
  return status, json.loads(out) if out else {}, errors


@pytest.mark.parametrize('executor', ['threads', 'processes'])
def test_whole_shards_are_indexed_and_damaged_ones_named(folder, capsys, executor):
  command = (folder, f'--executor={executor}', '--workers=2')
  status, summary, errors = run(capsys, *command)
  size = sum((folder / name).stat().st_size for name in ('a.tar', 'c.tar'))
  assert status == 0
  expected = {'examples': 7, 'shards': 2, 'bytes': size, 'damaged': 1, 'indexed': 3}
  assert {key: summary[key] for key in expected} == expected
  assert 'left out: ' in errors and 'b.tar: truncated: it has 2000 bytes' in errors
  source = TarShards(summary['manifest'])
  assert [r['caption'] for r in source] == [b'caption %d' % i for i in (0, 1, 2, 6, 7, 8, 9)]
  if executor == 'threads':
    assert run(capsys, *command, '--strict')[0] == 1


def test_a_finished_shard_is_never_read_again(folder, capsys, monkeypatch):
  before = tar_index.iterate_files
  done = []

  def interrupted(*arguments):
    if done:
      raise KeyboardInterrupt
    done.append(1)
    return before(*arguments)

  monkeypatch.setattr(tar_index, 'iterate_files', interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(capsys, folder, '--executor=threads', '--workers=1')
  assert len(list(folder.iterdir())) == 4  # one index, nothing half written
  monkeypatch.setattr(tar_index, 'iterate_files', before)
  assert run(capsys, folder, '--executor=threads')[1]['indexed'] == 2
  monkeypatch.setattr(tar_index, 'iterate_files', lambda *_: pytest.fail('read again'))
  assert run(capsys, folder, '--executor=threads')[1]['indexed'] == 0


def test_nothing_usable_and_unreadable(folder, capsys, monkeypatch):
  status, summary, _ = run(capsys, folder / 'b.tar', '--executor=threads')
  assert status == 1 and summary['examples'] == 0

  def scan(url):
    if url.endswith('c.tar'):
      raise tar_index.StoreError(5, 'disk on fire', url)
    return before(url)

  before = tar_index.scan
  monkeypatch.setattr(tar_index, 'scan', scan)
  status, summary, errors = run(capsys, folder, '--executor=threads')
  assert status == 0 and summary['examples'] == 3 and 'cannot be read: disk on fire' in errors
  monkeypatch.setattr(tar_index, 'scan', before)  # a failure is not kept as damage is
  assert run(capsys, folder, '--executor=threads')[1]['examples'] == 7


def test_shards_and_indexes_in_a_store(folder, capsys):
  store = fsspec.filesystem('memory')
  try:
    for file in folder.iterdir():
      store.pipe_file(f'/bucket/{file.name}', file.read_bytes())
    command = ('memory://bucket/*.tar', '--index_dir=memory://bucket/index')
    _, summary, _ = run(capsys, *command)
    assert summary['examples'] == 7 and summary['manifest'] == 'memory://bucket/index/manifest.json'
    assert len(store.ls('/bucket/index')) == 4
    assert run(capsys, *command)[1]['indexed'] == 0
    assert TarShards(summary['manifest'])[5]['caption'] == b'caption 8'
    status, _, errors = run(capsys, 'memory://bucket/*.tar')
    assert status == 2 and '--manifest is missing' in errors
  finally:
    store.rm('/bucket', recursive=True)


@pytest.mark.parametrize(
  'options, reason',
  [
    (['--workers=0'], '--workers=0 must be'),
    (['--color'], "'--color' is no option"),
    (['--manifest=x.txt'], 'must end in .json'),
    (['--executor=gpu'], 'processes'),
    (['--caption_key=yaml:x'], "'yaml:x'"),
    (['/nowhere'], '/nowhere: does not exist'),
  ],
)
def test_wrong_options_are_told_in_one_line(folder, capsys, options, reason):
  status, _, errors = run(capsys, folder, *options)
  assert status == 2 and errors.startswith('error: ') and reason in errors
  assert errors.count('\n') == 1


def test_workers_end_with_the_program_however_that_ends(tmp_path, program):
  (tmp_path / 'a.tar').write_bytes(shard(range(3)))
  os.mkfifo(tmp_path / 'b.tar')  # whose reader waits for ever
  command = ('tools.index_shards', str(tmp_path), '--executor=processes', '--workers=1')
  process = program(*command, DPCAP_TEST_MARK=str(tmp_path))

  def alive():
    found = 0
    for file in pathlib.Path('/proc').glob('[0-9]*/environ'):
      with contextlib.suppress(OSError):
        found += f'DPCAP_TEST_MARK={tmp_path}'.encode() in file.read_bytes()
    return found

  def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
      assert time.monotonic() < end
      time.sleep(0.05)

  wait_until(lambda: len(list(tmp_path.iterdir())) > 2)  # the index of the first shard
  assert alive() > 1
  process.kill()
  try:
    wait_until(lambda: not alive())
  finally:  # a worker that is left over holds the pipes
    os.close(os.open(tmp_path / 'b.tar', os.O_RDWR))


def write(path, members):
  with tarfile.open(path, mode='w') as tar:
    for name in members:
      info = tarfile.TarInfo(name)
      info.size = 1
      tar.addfile(info, io.BytesIO(b'x'))


def test_what_is_odd_is_counted_and_said(tmp_path, capsys):
  write(tmp_path / 'a.tar', ['0.jpg', '0.txt', '1.jpg', '1.txt', '1.jpg', '2.jpg', 'README.md'])
  write(tmp_path / 'b.tar', ['0.jpg', '1.jpg', '0.txt', '1.txt'])
  status, summary, errors = run(capsys, tmp_path, '--executor=threads')
  counted = {'examples': 4, 'with_image': 4, 'with_caption': 2, 'with_both': 2, 'strays': 1}
  counted |= {'repeated_keys': 1, 'damaged': 1}
  assert status == 0 and {key: summary[key] for key in counted} == counted
  assert "b.tar: files of one sample lie apart, those of key '0' first" in errors
  assert 'note: N = 4 samples: ' in errors
  status, summary, errors = run(capsys, tmp_path, '--executor=threads', '--caption_key=json:text')
  assert status == 1 and summary['with_both'] == 0
  assert 'WARNING, fewer than half can be used: N = 6 samples' in errors
  assert 'extensions there: jpg (6), txt (4), md (1)' in errors


def test_the_tool_and_the_config_have_one_key_for_the_image(tmp_path, capsys):
  write(tmp_path / 'a.tar', ['0.input.jpg', '0.outputs.txt'])
  status, _, errors = run(capsys, tmp_path, '--executor=threads')
  assert status == 1 and 'extensions there are: input.jpg (1), outputs.txt (1)' in errors
  keys = {'image_keys': 'input.jpg', 'caption_key': 'outputs.txt'}
  options = [f'--{key}={value}' for key, value in keys.items()]
  status, summary, _ = run(capsys, tmp_path, '--executor=threads', *options)
  config = source_config('tar_shards', path=summary['manifest'], **keys)
  assert status == 0 and len(data.make_source(image_size=8, **config)) == 1
