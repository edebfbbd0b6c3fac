import io
import json
import os
import pickle
import tarfile
import time

import fsspec
import numpy as np
import pytest
from absl import logging
from PIL import Image

from dpcap.data import tar_shards
from dpcap.data.image import decode
from dpcap.data.source import BadRecord, check_caption
from dpcap.data.tar_shards import TarShards
from dpcap.errors import UserError


def jpeg(i: int) -> bytes:
  file = io.BytesIO()
  Image.new('RGB', (8, 8), (i % 256, 0, 0)).save(file, 'JPEG')
  return file.getvalue()


def sample(i: int, label='even') -> dict[str, bytes]:
  return {
    f'{i:05}.jpg': jpeg(i),
    f'{i:05}.txt': f'caption {i}'.encode(),
    f'{i:05}.json': json.dumps({'caption': f'json caption {i}', 'label': label}).encode(),
  }


def tar_bytes(members: dict[str, bytes], format=tarfile.USTAR_FORMAT) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w', format=format) as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return file.getvalue()


def write_shard(path, numbers, **options) -> str:
  members = {}
  for i in numbers:
    members |= sample(i, **options)
  path.write_bytes(tar_bytes(members))
  return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  folder = tmp_path / 'shards'
  folder.mkdir()
  return folder


@pytest.fixture
def warnings(monkeypatch):
  """The warnings logged, one string each."""
  lines = []
  monkeypatch.setattr(
    logging, 'warning', lambda message, *arguments: lines.append(message % arguments)
  )
  return lines


def captions(source) -> list:
  return [source[i]['caption'] for i in range(len(source))]


# --- reading --------------------------------------------------------------------------


def test_records_in_order(folder, warnings):
  write_shard(folder / 'b.tar', range(5, 8))
  write_shard(folder / 'a.tar', range(5))
  source = TarShards(folder)
  assert len(source) == 8 and source.class_names == () and not warnings
  for i, record in enumerate(source):
    assert record == {'image': jpeg(i), 'caption': f'caption {i}'.encode(), 'label': -1}
  for i in (-1, 8):
    with pytest.raises(IndexError):
      source[i]


def test_paths(folder):
  for i in range(12):
    write_shard(folder / f'{i:05}.tar', [i])
  write_shard(folder / 'other.tar', [99])
  expected = [f'caption {i}'.encode() for i in range(12)]
  assert captions(TarShards(folder)) == [*expected, b'caption 99']
  assert captions(TarShards(f'{folder}/0*.tar')) == expected
  assert captions(TarShards(f'{folder}/{{00002..00010}}.tar')) == expected[2:11]
  assert captions(TarShards(f'{folder}/0000{{3..3}}.tar')) == expected[3:4]
  assert captions(TarShards(str(folder / '00003.tar'))) == expected[3:4]
  assert captions(TarShards([folder / '00007.tar', f'{folder}/0001*.tar'])) == [
    expected[7],
    *expected[10:],
  ]


def test_captions_from_json(folder):
  write_shard(folder / 'a.tar', range(3))
  assert captions(TarShards(folder, caption_key='json:caption')) == [
    f'json caption {i}' for i in range(3)
  ]
  assert captions(TarShards(folder, caption_key='json:title')) == [None] * 3
  with pytest.raises(UserError, match="'yaml:caption'"):
    TarShards(folder, caption_key='yaml:caption')
  with pytest.raises(UserError, match='without label_key'):
    TarShards(folder, class_names=['a'])


@pytest.mark.parametrize('format', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_strange_members(folder, format):
  deep = 'a very long folder name/' * 12
  members = {
    f'{deep}犬.first.jpg': b'wrong',
    f'{deep}犬.JPG': jpeg(1),
    f'{deep}犬.txt': b'one',
    'README': b'no extension',
    'x/._0.jpg': b'a file of another system',
    'x/0.webp': b'two',
    'x/0.txt': b'2',
    'y/0.txt': b'3',
    'y/0.png': b'three',
  }
  (folder / 'a.tar').write_bytes(tar_bytes(members, format))
  source = TarShards(folder)
  assert [(r['image'], r['caption']) for r in source] == [
    (jpeg(1), b'one'),
    (b'two', b'2'),
    (b'three', b'3'),
  ]


def test_samples_without_image_or_caption_count(folder):
  members = (
    sample(0) | {'1.jpg': jpeg(1)} | {'2.txt': b'two'} | {'3.jpg': b'', '3.txt': b''} | sample(4)
  )
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  source = TarShards(folder)
  assert len(source) == 5
  assert source[1]['caption'] is None and source[2]['image'] == b'' and source[3]['image'] == b''
  for index in (1, 3):
    with pytest.raises(BadRecord):
      check_caption(source[index]['caption'])
  for index in (2, 3):
    with pytest.raises(BadRecord):
      decode(source[index]['image'])
  assert source[4]['caption'] == b'caption 4'


def test_only_the_byte_ranges_are_read(folder, monkeypatch):
  members = {
    '0.jpg': jpeg(0),
    '0.bin': bytes(2**20),
    '0.txt': b'far',
    '1.jpg': jpeg(1),
    '1.txt': b'near',
  }
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  source, reads = TarShards(folder), []
  local = type(fsspec.filesystem('file'))
  cat_file = local.cat_file

  def counted(fs, path, start, end):
    reads.append(end - start)
    return cat_file(fs, path, start, end)

  monkeypatch.setattr(local, 'cat_file', counted)
  assert source[0]['caption'] == b'far' and reads == [len(jpeg(0)), 3]
  reads.clear()
  assert source[1]['caption'] == b'near' and len(reads) == 1 and reads[0] < 4096


def test_pickled_into_another_process(folder):
  import multiprocessing

  write_shard(folder / 'a.tar', range(10))
  source = TarShards(folder)
  assert len(pickle.dumps(source)) < 1000
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    assert pool.apply(source.__getitem__, (7,)) == source[7]


def test_remote_shards(folder, tmp_path):
  remote = fsspec.filesystem('memory')
  for i in range(2):
    remote.pipe_file(f'/bucket/{i}.tar', tar_bytes(sample(2 * i) | sample(2 * i + 1)))
  try:
    for path in ('memory://bucket', 'memory://bucket/*.tar', 'memory://bucket/{0..1}.tar'):
      assert captions(TarShards(path)) == [f'caption {i}'.encode() for i in range(4)]
  finally:
    remote.rm('/bucket', recursive=True)
  assert len(list((tmp_path / 'cache' / 'dpcap').rglob('*.npz'))) == 2


# --- labels ---------------------------------------------------------------------------


def test_collected_class_names(folder, monkeypatch):
  write_shard(folder / 'a.tar', [0, 1], label='zebra')
  write_shard(folder / 'b.tar', [2], label='ant')
  unlabelled = {'3.jpg': jpeg(3), '3.txt': b'no json', '4.jpg': jpeg(4), '4.json': b'{}'}
  (folder / 'c.tar').write_bytes(tar_bytes(unlabelled))
  source = TarShards(folder, label_key='label')
  assert source.class_names == ('ant', 'zebra')
  assert [record['label'] for record in source] == [1, 1, 0, -1, -1]
  monkeypatch.setattr(tar_shards, '_collect_labels', lambda *_: pytest.fail('read again'))
  assert TarShards(folder, label_key='label').class_names == ('ant', 'zebra')


def test_whole_numbers_sort_as_numbers(folder):
  for i, label in enumerate([10, 9, 100]):
    write_shard(folder / f'{i}.tar', [i], label=label)
  source = TarShards(folder, label_key='label')
  assert source.class_names == ('9', '10', '100')
  assert [record['label'] for record in source] == [1, 0, 2]


def test_given_class_names(folder, monkeypatch):
  monkeypatch.setattr(tar_shards, '_collect_labels', lambda *_: pytest.fail('names are given'))
  for i, label in enumerate(['b', 0, 'c', 2, None]):
    write_shard(folder / f'{i}.tar', [i], label=label)
  source = TarShards(folder, label_key='label', class_names=['a', 'b'])
  assert source.class_names == ('a', 'b')
  assert [source[0]['label'], source[1]['label'], source[4]['label']] == [1, 0, -1]
  for i in (2, 3):
    with pytest.raises(BadRecord, match='none of the 2 classes'):
      source[i]


@pytest.mark.parametrize('damaged', [b'{', b'[1]', b'\xff'])
def test_damaged_json_is_a_bad_record_only_where_it_is_needed(folder, damaged):
  members = sample(0) | sample(1) | {'00001.json': damaged}
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  assert len(captions(TarShards(folder))) == 2
  for source in (
    TarShards(folder, label_key='label'),
    TarShards(folder, caption_key='json:caption'),
  ):
    assert len(source) == 2 and source[0]
    with pytest.raises(BadRecord, match='json'):
      source[1]


# --- damaged shards -------------------------------------------------------------------


def test_a_truncated_shard_keeps_its_complete_samples(folder, warnings):
  whole = tar_bytes(sample(0) | sample(1) | {'00002.txt': b'x' * 5000, '00002.jpg': jpeg(2)})
  with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
    offsets = {member.name: member.offset_data for member in tar}
  cuts = {
    offsets['00002.txt'] + 100: 2,  # inside a member
    offsets['00002.txt']: 2,  # between a header and its data
    offsets['00002.jpg'] - 200: 2,  # inside a header: caption there, image gone
    offsets['00001.txt'] + 3: 1,
    offsets['00002.jpg'] + 1024: 3,  # nothing lost but the end marker
  }
  for number, (cut, kept) in enumerate(cuts.items()):
    (folder / f'{number}.tar').write_bytes(whole[:cut])
    warnings.clear()
    source = TarShards(folder / f'{number}.tar')
    assert captions(source)[:2] == [b'caption 0', b'caption 1'][:kept] and len(source) == kept
    assert len(warnings) == (kept < 3)
    if warnings:
      assert f'{number}.tar' in warnings[0] and f'first {kept} samples are kept' in warnings[0]
    for record in source:
      decode(record['image'])


def test_damage_inside_a_shard_is_noticed(folder, warnings):
  whole = bytearray(tar_bytes(sample(0) | sample(1)))
  with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
    start = tar.getmember('00001.jpg').offset
  whole[start : start + 512] = b'\xa5' * 512
  (folder / 'a.tar').write_bytes(whole)
  assert captions(TarShards(folder)) == [b'caption 0']
  assert len(warnings) == 1 and f'damaged at byte {start}' in warnings[0]


def test_empty_and_foreign_shards_are_left_out_and_named(folder, warnings):
  write_shard(folder / 'a.tar', [0])
  (folder / 'b.tar').write_bytes(tar_bytes({}))
  (folder / 'c.tar').write_bytes(b'')
  (folder / 'd.tar').write_bytes(b'<html>403 Forbidden</html>' * 100)
  write_shard(folder / 'e.tar', [1])
  for _ in range(2):  # the second time from the index files
    warnings.clear()
    assert captions(TarShards(folder)) == [b'caption 0', b'caption 1']
    assert [line.partition(':')[0][-5:] for line in warnings] == ['b.tar', 'c.tar', 'd.tar']
    assert 'no samples' in warnings[0] and 'not an uncompressed tar' in warnings[2]


def test_a_shard_cut_after_indexing_gives_bad_records(folder):
  path = write_shard(folder / 'a.tar', range(4))
  source = TarShards(folder)
  os.truncate(path, os.path.getsize(path) // 4)
  assert source[0]['caption'] == b'caption 0'
  with pytest.raises(BadRecord, match='cut after'):
    source[3]


@pytest.mark.parametrize(
  'path, reason',
  [
    ('{}/nowhere', 'does not exist'),
    ('{}', 'no shard found'),
    ('{}/*.tar', 'no shard found'),
    ('{}/{{0..2}}.tar', '3 of 3 shards missing, first'),
    ('{}/{{2..0}}.tar', 'range {2..0} is empty'),
    ([], 'empty list'),
  ],
)
def test_paths_without_shards_are_refused(folder, path, reason):
  path = path.format(folder) if isinstance(path, str) else path
  with pytest.raises(UserError, match=reason) as error:
    TarShards(path)
  assert '\n' not in str(error.value) and (not path or path in str(error.value))


def test_shards_without_any_sample_are_refused(folder, warnings):
  (folder / 'a.tar').write_bytes(tar_bytes({}))
  (folder / 'b.tar').write_bytes(b'nothing')
  with pytest.raises(UserError, match=r'2 shard\(s\) found, but none holds a sample') as error:
    TarShards(folder)
  assert str(folder) in str(error.value) and 'KEY.jpg' in str(error.value)


# --- the index files ------------------------------------------------------------------


def test_the_index_is_kept_beside_the_shard(folder, monkeypatch):
  write_shard(folder / 'a.tar', range(3))
  assert len(TarShards(folder)) == 3
  assert sorted(file.name for file in folder.iterdir()) == ['a.tar', 'a.tar.index.npz']
  monkeypatch.setattr(tar_shards, '_scan', lambda *_: pytest.fail('scanned again'))
  assert captions(TarShards(folder)) == [f'caption {i}'.encode() for i in range(3)]


def test_a_stale_or_foreign_index_is_made_again(folder):
  write_shard(folder / 'a.tar', range(3))
  assert captions(TarShards(folder))[0] == b'caption 0'
  write_shard(folder / 'a.tar', range(5, 10))  # another size
  assert captions(TarShards(folder)) == [f'caption {i}'.encode() for i in range(5, 10)]
  write_shard(folder / 'a.tar', range(10, 15))  # the same size, another time
  os.utime(folder / 'a.tar', ns=(0, time.time_ns() + 10**9))
  assert captions(TarShards(folder)) == [f'caption {i}'.encode() for i in range(10, 15)]
  swapped = TarShards(
    folder, image_keys=('txt',), caption_key='json'
  )  # the same shard, other members
  assert [record['image'] for record in swapped] == captions(TarShards(folder))
  for content in (b'', b'no npz', (folder / 'a.tar.index.npz').read_bytes()[:200]):
    (folder / 'a.tar.index.npz').write_bytes(content)
    assert len(TarShards(folder)) == 5
  np.savez(folder / 'a.tar.index.npz', other=np.zeros(3))
  assert len(TarShards(folder)) == 5


def test_a_read_only_folder_is_left_alone(folder, tmp_path):
  write_shard(folder / 'a.tar', range(3))
  folder.chmod(0o555)
  try:
    assert len(TarShards(folder)) == 3
    assert [file.name for file in folder.iterdir()] == ['a.tar']
  finally:
    folder.chmod(0o755)
  assert len(list((tmp_path / 'cache' / 'dpcap').rglob('*.npz'))) == 1


def test_index_dir(folder, tmp_path):
  (folder / 'x').mkdir()
  write_shard(folder / 'a.tar', range(3))
  write_shard(folder / 'x' / 'a.tar', range(4))
  source = TarShards([folder, folder / 'x'], index_dir=tmp_path / 'index')
  assert len(source) == 7 and source[6]['caption'] == b'caption 3'
  assert len(list((tmp_path / 'index').iterdir())) == 2 and not list(folder.rglob('*.npz'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    UserError, match='a.tar: cannot be written to .*expected a writable index_dir'
  ):
    TarShards(folder, index_dir=tmp_path / 'file')
