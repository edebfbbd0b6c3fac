import io
import json
import os
import pathlib
import pickle
import re
import tarfile
import time

import fsspec
import numpy as np
import pytest
from absl import logging
from PIL import Image

from dpcap.data import groups as groups_lib
from dpcap.data import tar_index, tar_manifest, tar_shards
from dpcap.data.byte_ranges import StoreError
from dpcap.data.image import decode
from dpcap.data.source import BadRecord, check_caption, read_each
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


def tar_bytes(members, format=tarfile.USTAR_FORMAT) -> bytes:
  """A tar of members, a dict or pairs of name and data."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w', format=format) as tar:
    for name, data in members.items() if isinstance(members, dict) else members:
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


def test_a_label_that_is_no_name_is_a_bad_record(folder):
  for i, label in enumerate(['ant', ['ant'], {'a': 1}]):
    write_shard(folder / f'{i}.tar', [i], label=label)
  source = TarShards(folder, label_key='label')
  assert source.class_names == ('ant',) and source[0]['label'] == 0
  for i in (1, 2):
    with pytest.raises(BadRecord, match='label is a'):
      source[i]


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


def test_images_without_a_caption_count_and_strays_do_not(folder, warnings):
  members = (
    sample(0) | {'1.jpg': jpeg(1)} | {'2.txt': b'two'} | {'3.jpg': b'', '3.txt': b''} | sample(4)
  )
  strays = {'LICENSE.txt': b'MIT', 'README.md': b'see', 'lone.cls': b'7', 'other.json': b'{}'}
  (folder / 'a.tar').write_bytes(tar_bytes(strays | members))
  source = TarShards(folder)
  assert len(source) == 4
  assert source[1]['caption'] is None and source[2]['image'] == b''
  for index in (1, 2):
    with pytest.raises(BadRecord):
      check_caption(source[index]['caption'])
  with pytest.raises(BadRecord):
    decode(source[2]['image'])
  assert source[3]['caption'] == b'caption 4'
  (line,) = warnings
  assert 'N = 4 samples: 3 with an image that holds anything, 2 with KEY.txt, 2 with both;' in line
  assert '5 keys without an image (strays) do not count' in line


def test_a_key_that_comes_again_is_another_sample(folder, warnings):
  """Also at once, where two of the three would vanish."""
  pair = lambda key, i: [(f'{key}.jpg', jpeg(i)), (f'{key}.txt', b'%d' % i)]
  members = [*pair('a', 0), *pair('a', 1), *pair('a', 2), *pair('b', 3), *pair('a', 4)]
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  source = TarShards(folder)
  assert [(r['image'], r['caption']) for r in source] == [(jpeg(i), b'%d' % i) for i in range(5)]
  assert len(warnings) == 1 and '3 have the key of another one' in warnings[0]


def test_of_several_images_of_a_sample_the_first(folder, warnings):
  members = {'0.png': b'first', '0.jpg': b'second', '0.txt': b'0'}
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  (record,) = TarShards(folder)
  assert record['image'] == b'first' and not warnings


@pytest.mark.parametrize('others', ['txt', 'json'])
def test_a_tar_sorted_by_extension_is_refused_with_its_cure(folder, warnings, others):
  keys = [f'x/{i}' for i in range(3)]
  members = {f'{key}.jpg': jpeg(0) for key in keys} | {f'{key}.{others}': b'{}' for key in keys}
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  for _ in range(2):  # the second time from the index file
    with pytest.raises(UserError, match=r"a\.tar: .*of key 'x/0' first; .*`tar --sort=name`"):
      TarShards(folder, caption_key='txt' if others == 'txt' else 'json:caption')
  write_shard(folder / 'b.tar', range(3))
  warnings.clear()
  assert len(TarShards(folder)) == 3
  (line,) = warnings
  assert 'a.tar: shard left out: files of one sample lie apart' in line


def test_an_extension_with_dots_is_a_matter_of_the_config(folder):
  members = {'0.input.JPG': jpeg(0), '0.Outputs.txt': b'zero', '1.input.jpg': jpeg(1)}
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  with pytest.raises(UserError, match=r'input\.jpg \(2\), outputs\.txt \(1\)') as error:
    TarShards(folder)
  assert 'no file KEY.jpg or with another of image_keys' in str(error.value)
  source = TarShards(folder, image_keys='png,input.jpg', caption_key='outputs.txt')
  assert len(source) == 2 and source[0] == {'image': jpeg(0), 'caption': b'zero', 'label': -1}
  with pytest.raises(UserError, match="image_keys is 'jpg,,png'"):
    TarShards(folder, image_keys='jpg,,png')


def test_keys_with_dots_are_refused_with_the_extensions_there(folder):
  """22.05.jpg and 22.06.jpg are of one key, 22, to webdataset too."""
  members = {f'22.{i:02}.{kind}': b'x' for i in range(3) for kind in ('jpg', 'txt')}
  (folder / 'a.tar').write_bytes(tar_bytes(members))
  with pytest.raises(UserError, match=r'ends at the first dot, .* there are: 00\.jpg \(1\), 00'):
    TarShards(folder)


def test_a_hard_link_is_the_file_that_it_names(folder):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=tarfile.GNU_FORMAT) as tar:
    for i in range(2):
      info = tarfile.TarInfo(f'{i}.jpg')
      if i:
        info.type, info.linkname = tarfile.LNKTYPE, '0.jpg'
        tar.addfile(info)
      else:
        info.size = len(jpeg(7))
        tar.addfile(info, io.BytesIO(jpeg(7)))
      info = tarfile.TarInfo(f'{i}.txt')
      info.size = 1
      tar.addfile(info, io.BytesIO(b'%d' % i))
  (folder / 'a.tar').write_bytes(out.getvalue())
  source = TarShards(folder)
  assert [(r['image'], r['caption']) for r in source] == [(jpeg(7), b'0'), (jpeg(7), b'1')]


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
  pread = os.pread
  monkeypatch.setattr(os, 'pread', lambda *where: reads.append(where[1]) or pread(*where))
  assert source[0]['caption'] == b'far' and reads == [len(jpeg(0)), 3]


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


def test_read_each_gives_records_and_bad_ones_in_turn(folder):
  remote = fsspec.filesystem('memory')
  members = sample(0) | sample(1) | {'00001.json': b'{'} | sample(2)
  for i in range(2):
    remote.pipe_file(f'/bucket/{i}.tar', tar_bytes(members))
  try:
    source = TarShards('memory://bucket', caption_key='json:caption')
    order = [5, 0, 1, 3, 2, 0]
    records = list(read_each(source, order))
    for index, record in zip(order, records, strict=True):
      if index % 3 == 1:
        assert isinstance(record, BadRecord) and 'json' in str(record)
      else:
        assert record == source[index] and record['image'] == jpeg(index % 3)
    assert source.where(2).endswith('/0.tar') and source.where(3).endswith('/1.tar')
  finally:
    remote.rm('/bucket', recursive=True)


# --- the manifest ---------------------------------------------------------------------


def write_manifest(folder, firsts=(), keep=None, **options) -> str:
  wanted = tar_shards.make_wanted(
    options.get('image_keys'), 'txt', options.get('label_key')
  )
  indexes = [tar_index.index_shard(shard, wanted) for shard in tar_index.find_shards(folder)]
  firsts = np.array(firsts)
  groups = groups_lib.write(f'{folder}/all.json', firsts, keep) if keep else None
  tar_manifest.write(f'{folder}/all.json', indexes, wanted, groups)
  return f'{folder}/all.json'


def test_a_manifest_settles_the_shards_before_the_run(folder, monkeypatch):
  write_shard(folder / 'a.tar', range(3), label='x')
  (folder / 'b.tar').write_bytes(b'damaged')
  write_shard(folder / 'c.tar', range(5, 9), label='y')
  manifest = write_manifest(folder, label_key='label')
  assert len(json.loads(pathlib.Path(manifest).read_text())['left_out']) == 1
  plain, labelled = TarShards(folder), TarShards(folder, label_key='label')
  write_shard(folder / 'b.tar', [99])  # mended, but too late
  monkeypatch.setattr(tar_shards, 'index_shard', lambda *_: pytest.fail('indexed again'))
  source = TarShards(manifest)
  assert len(source) == 7 and captions(source) == captions(plain)
  assert source.fingerprint == plain.fingerprint
  assert list(TarShards(manifest, label_key='label')) == list(labelled)
  with pytest.raises(UserError, match='index_dir'):
    TarShards(manifest, index_dir=folder)


@pytest.fixture
def grouped(folder):
  """Writes manifests of 6 samples in two shards, 0 and 4 near duplicates, and 1, 2 and 5."""
  write_shard(folder / 'a.tar', range(3))
  write_shard(folder / 'b.tar', range(3, 6))
  return lambda keep: write_manifest(folder, firsts=[0, 1, 1, 3, 0, 1], keep=keep)


def test_a_group_of_samples_is_one_record(grouped):
  source = TarShards(grouped('all'))
  assert len(source) == 3 and 'N = 3 groups of near duplicates of 6 samples' in source.about
  assert captions(source) == [b'caption 0', b'caption 1', b'caption 3']
  assert source.where(2).endswith('a.tar') and source.where(3).endswith('b.tar')
  seen = [set(), set(), set()]
  for seed in range(40):
    rngs = [np.random.default_rng([seed, i]) for i in range(3)]
    for i, record in enumerate(read_each(pickle.loads(pickle.dumps(source)), range(3), rngs)):
      seen[i].add(int(record['caption'].split()[1]))
      assert record['image'] == jpeg(int(record['caption'].split()[1]))
  assert seen == [{0, 4}, {1, 2, 5}, {3}]
  for read in (lambda: source[3], lambda: list(read_each(source, [3]))):
    with pytest.raises(IndexError):
      read()


def test_of_near_duplicates_one_is_kept(grouped):
  source = TarShards(grouped('one'))
  assert len(source) == 3 and 'N = 3 that were kept of 6 samples' in source.about
  for rngs in (None, [np.random.default_rng(i) for i in range(3)]):
    read = [record['caption'] for record in read_each(source, [0, 1, 2], rngs)]
    assert read == [b'caption 0', b'caption 1', b'caption 3']


def test_other_groups_of_the_same_shards_are_another_source(grouped):
  prints = {TarShards(grouped(keep)).fingerprint for keep in (None, 'one', 'all')}
  assert len(prints) == 3


def test_groups_that_do_not_fit_are_refused(grouped, folder):
  manifest = pathlib.Path(grouped('all'))
  content = json.loads(manifest.read_text())
  for key, value, reason in (
    ('records', 5, 'groups of 5 examples, its shards have 6'),
    ('count', 2, 'other groups than 2'),
    ('keep', 'some', "keep is 'some'; expected one of all, one"),
  ):
    changed = content | {'groups': content['groups'] | {key: value}}
    manifest.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=reason):
      TarShards(str(manifest))
  for damaged in ('x', {}, 5):
    manifest.write_text(json.dumps(content | {'groups': damaged}))
    with pytest.raises(UserError, match='not a manifest'):
      TarShards(str(manifest))
  # The numbers of the samples would stand for others.
  manifest.write_text(json.dumps(content | {'shards': content['shards'][::-1]}))
  with pytest.raises(UserError, match='groups are of other shards, or of these in another order'):
    TarShards(str(manifest))
  manifest.write_text(json.dumps(content))
  (folder / content['groups']['file']).unlink()
  with pytest.raises(UserError, match=r'all\.\w+\.npy cannot be read'):
    TarShards(str(manifest))


def test_a_manifest_of_other_members_or_shards_is_refused(folder):
  write_shard(folder / 'a.tar', range(3))
  manifest = write_manifest(folder)
  for options, reason in [
    ({'image_keys': 'png'}, 'image_keys'),
    ({'caption_key': 'json:caption'}, "caption_key 'txt', this config has ''"),
    ({'label_key': 'label'}, 'label_key None'),
  ]:
    with pytest.raises(UserError, match=reason):
      TarShards(manifest, **options)
  assert len(TarShards(manifest, label_key='label', class_names=['even'])) == 3
  (index,) = folder.glob('a.tar.*.npz')
  index.rename(folder / 'away')
  with pytest.raises(UserError, match=f'the index .*{index.name} of shard .*a.tar cannot be read'):
    TarShards(manifest)
  (folder / 'away').rename(index)
  miscounted = json.loads(pathlib.Path(manifest).read_text()) | {'examples': 4}
  (folder / 'other.json').write_text(json.dumps(miscounted))
  with pytest.raises(UserError, match='other.json: .*says 4 examples, its shards have 3'):
    TarShards(folder / 'other.json')
  write_shard(folder / 'a.tar', range(4))
  with pytest.raises(UserError, match='a.tar changed after'):
    TarShards(manifest)
  for content in ('{}', '[]', 'x', '{"format": "other"}'):
    pathlib.Path(manifest).write_text(content)
    with pytest.raises(UserError, match='not a manifest'):
      TarShards(manifest)
  with pytest.raises(UserError, match='cannot be read'):
    TarShards(folder / 'none.json')


# --- labels ---------------------------------------------------------------------------


def test_collected_class_names(folder, monkeypatch):
  write_shard(folder / 'a.tar', [0, 1], label='zebra')
  write_shard(folder / 'b.tar', [2], label='ant')
  unlabelled = {'3.jpg': jpeg(3), '3.txt': b'no json', '4.jpg': jpeg(4), '4.json': b'{}'}
  (folder / 'c.tar').write_bytes(tar_bytes(unlabelled))
  source = TarShards(folder, label_key='label')
  assert source.class_names == ('ant', 'zebra')
  assert [record['label'] for record in source] == [1, 1, 0, -1, -1]
  monkeypatch.setattr(tar_index, 'iterate_files', lambda *_: pytest.fail('read again'))
  assert TarShards(folder, label_key='label').class_names == ('ant', 'zebra')
  assert TarShards(folder).class_names == ()
  assert [record['label'] for record in source] == [1, 1, 0, -1, -1]


def test_whole_numbers_sort_as_numbers(folder):
  for i, label in enumerate([10, 9, 100]):
    write_shard(folder / f'{i}.tar', [i], label=label)
  source = TarShards(folder, label_key='label')
  assert source.class_names == ('9', '10', '100')
  assert [record['label'] for record in source] == [1, 0, 2]


def test_given_class_names(folder, monkeypatch):
  monkeypatch.setattr(tar_index, '_label', lambda *_: pytest.fail('names are given'))
  for i, label in enumerate(['b', 0, 'c', 2, None]):
    write_shard(folder / f'{i}.tar', [i], label=label)
  source = TarShards(folder, label_key='label', class_names=['a', 'b'])
  assert source.class_names == ('a', 'b')
  assert [source[0]['label'], source[1]['label'], source[4]['label']] == [1, 0, -1]
  for i in (2, 3):
    with pytest.raises(BadRecord, match='none of the 2 classes'):
      source[i]


@pytest.mark.parametrize(
  'damaged', [b'{', b'[1]', b'\xff', b'{"a":' * 100_000 + b'1' + b'}' * 100_000]
)
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


def test_a_damaged_shard_is_left_out_and_named(folder, warnings):
  whole = tar_bytes(sample(0) | sample(1) | {'00002.txt': b'x' * 5000, '00002.jpg': jpeg(2)})
  with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
    members = {member.name: member for member in tar}
  end = members['00002.jpg'].offset_data + 512 * 2
  start = members['00001.jpg'].offset
  damages = {
    'truncated: .* 00002.txt needs': whole[: members['00002.txt'].offset_data + 100],
    'truncated: .* 00002.txt': whole[: members['00002.txt'].offset_data],
    'truncated: .* inside a header': whole[: members['00002.jpg'].offset + 300],
    f'damaged at byte {start}:': whole[:start] + b'\xa5' * 512 + whole[start + 512 :],
    f'damaged at byte {len(whole)}:': whole + b'\xa5' * 512,
    'damaged at byte 0:': b'<html>403 Forbidden</html>' * 100,
    'holds no samples.* are: none': tar_bytes({'README': b''}),
    'no samples.* are: txt': tar_bytes({'README.txt': b''}),
    'no samples': b'',
  }
  write_shard(folder / 'a.tar', [7])
  for number, content in enumerate(damages.values()):
    (folder / f'b{number}.tar').write_bytes(content)
  (folder / 'c.tar').write_bytes(whole[:end])  # nothing is lost but the end marker
  for _ in range(2):  # the second time from the index files
    warnings.clear()
    source = TarShards(folder)
    assert len(source) == 4 and captions(source)[:2] == [b'caption 7', b'caption 0']
    for number, (line, reason) in enumerate(zip(warnings, damages, strict=True)):
      assert f'b{number}.tar: shard left out: ' in line and re.search(reason, line), line


def test_a_shard_cut_after_indexing_is_the_stores_failure_not_a_bad_record(folder):
  path = write_shard(folder / 'a.tar', range(4))
  source = TarShards(folder)
  os.truncate(path, os.path.getsize(path) // 4)
  assert source[0]['caption'] == b'caption 0'
  with pytest.raises(StoreError, match=r'cut.*a\.tar'):
    source[3]


def test_a_shard_of_another_name_before_is_opened_again(folder):
  write_shard(folder / 'a.tar', [1, 2])
  assert captions(TarShards(folder)) == [b'caption 1', b'caption 2']
  write_shard(folder / 'b', [3, 4, 5])
  os.replace(folder / 'b', folder / 'a.tar')
  assert captions(TarShards(folder)) == [b'caption 3', b'caption 4', b'caption 5']


def test_an_index_made_again_during_a_run_is_noticed(folder):
  write_shard(folder / 'a.tar', range(3))
  source = TarShards(folder)
  write_shard(folder / 'a.tar', range(5))
  TarShards(folder)
  with pytest.raises(StoreError, match='made again'):
    source[0]


@pytest.mark.parametrize(
  'path, reason',
  [
    ('{}/nowhere', 'does not exist'),
    ('/dev/null/nowhere', 'does not exist'),
    ('/dev/null/{{0..2}}.tar', '3 of 3 shards missing, first'),
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
  assert str(folder) in str(error.value) and 'a.tar: holds no samples' in str(error.value)
  with pytest.raises(UserError, match=r'all.json: 0 shard\(s\) found, but none holds a sample'):
    TarShards(write_manifest(folder))


# --- the index files ------------------------------------------------------------------


def test_the_index_is_kept_beside_the_shard(folder, monkeypatch):
  write_shard(folder / 'a.tar', range(3))
  assert len(TarShards(folder)) == 3
  assert [len(list(folder.glob(name))) for name in ('a.tar', 'a.tar.*.npz', '*')] == [1, 1, 2]
  monkeypatch.setattr(tar_index, 'iterate_files', lambda *_: pytest.fail('scanned again'))
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
    folder, image_keys='txt', caption_key='json'
  )  # the same shard, other members
  assert [record['image'] for record in swapped] == captions(TarShards(folder))
  indexes = sorted(folder.glob('*.npz'))
  assert len(indexes) == 2
  other = io.BytesIO()
  np.savez(other, other=np.zeros(3))
  for content in (b'', b'no npz', indexes[0].read_bytes()[:200], other.getvalue()):
    for index in indexes:
      index.write_bytes(content)
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
