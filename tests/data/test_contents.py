"""Whether two sources share a record, whatever they are called."""

import io
import os
import shutil
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from dpcap import data
from dpcap.data import contents, tar_index, tar_manifest
from dpcap.data import groups as groups_lib
from dpcap.data.scenes import Scenes
from dpcap.data.source import BadRecord
from dpcap.data.tar_shards import TarShards, make_wanted
from dpcap.data.textures import Textures
from dpcap.data.tfds_source import TfdsSource
from tests.data.test_tfds_source import example, prepare


def relation(a, b):
  """What `compare` says, which must be the same the other way round."""
  found = data.compare(a.contents, b.contents)
  assert data.compare(b.contents, a.contents).apart == found.apart
  assert data.known_apart(a.contents, b.contents) == (found.apart is True)
  assert found.why
  return found.apart


def picture(number, side=8, kind='JPEG'):
  pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


# --- scenes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  'other, apart',
  [
    (dict(split='train', size=300), False),
    (dict(split='train', size=4000), False),
    (dict(split='train', size=400, label='shape'), False),
    (dict(split='train', size=1, image_size=64), False),
    (dict(split='test', size=400), True),
    (dict(split='validation', size=400), True),
  ],
)
def test_scenes_of_one_split_share_their_first_ones(other, apart):
  trained = Scenes(split='train', size=400, image_size=32)
  assert relation(trained, Scenes(**{'image_size': 32} | other)) == apart


@pytest.mark.parametrize(
  'other, apart',
  [
    (dict(split='train', size=300), False),
    (dict(split='train', size=1, programs=7, image_size=64), False),
    (dict(split='test', size=400), True),
  ],
)
def test_textures_of_one_split_share_their_first_ones(other, apart):
  trained = Textures(split='train', size=400, image_size=32)
  assert relation(trained, Textures(**{'image_size': 32} | other)) == apart
  assert relation(trained, Scenes(split='train', size=400, image_size=32)) is True


# --- tar shards -----------------------------------------------------------------------


def write_shard(path, numbers, name='{:05}', caption='caption {}', order=('jpg', 'txt')):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for number in numbers:
      members = {'jpg': picture(number), 'txt': caption.format(number).encode()}
      for extension in order:
        info = tarfile.TarInfo(f'{name.format(number)}.{extension}')
        info.size = len(members[extension])
        tar.addfile(info, io.BytesIO(members[extension]))
  return path


@pytest.fixture(name='trained')
def _trained(tmp_path, monkeypatch):
  """Three shards of ten images each, numbers 0 to 29, in tmp_path/shards; the source of them all."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  for shard in range(3):
    write_shard(tmp_path / f'shards/{shard:05}.tar', range(10 * shard, 10 * shard + 10))
  return TarShards(tmp_path / 'shards')


def _write_manifest(folder, firsts=(), keep=None):
  file = str(folder / 'all.json')
  wanted = make_wanted('jpg', 'txt', None)
  indexes = [tar_index.index_shard(str(path), wanted) for path in sorted(folder.glob('*.tar'))]
  groups = groups_lib.write(file, np.array(firsts), keep) if keep else None
  tar_manifest.write(file, indexes, wanted, groups)
  return file


@pytest.mark.parametrize(
  'path',
  [
    '{0}/shards/',
    '{0}/shards',
    'shards',
    '{0}/other/../shards',
    '{0}/shards/*.tar',
    '{0}/shards/{{00001..00002}}.tar',
    '{0}/shards/00002.tar',
    'file://{0}/shards/00002.tar',
    ['{0}/other', '{0}/shards/00001.tar'],
    '{0}/linked_folder',
    '{0}/linked/one.tar',
    '{0}/hard/one.tar',
    '{0}/copied',
    '{0}/shards/all.json',
  ],
)
def test_other_spellings_of_the_same_shards_are_seen(trained, tmp_path, path):
  write_shard(tmp_path / 'other/00000.tar', range(90, 95))
  (tmp_path / 'linked_folder').symlink_to('shards')
  for folder in ('linked', 'hard', 'copied'):
    (tmp_path / folder).mkdir()
  (tmp_path / 'linked/one.tar').symlink_to(tmp_path / 'shards/00002.tar')
  os.link(tmp_path / 'shards/00002.tar', tmp_path / 'hard/one.tar')
  shutil.copy(tmp_path / 'shards/00002.tar', tmp_path / 'copied/test.tar')
  options = {}
  if 'json' in path:
    _write_manifest(tmp_path / 'shards')
    options['image_keys'] = 'jpg'
  expand = lambda pattern: pattern.format(tmp_path)
  path = [*map(expand, path)] if isinstance(path, list) else expand(path)
  assert relation(trained, TarShards(path, **options)) is False


@pytest.mark.parametrize(
  'options',
  [
    dict(name='{:09}'),
    dict(caption='another caption of {}'),
    dict(name='test/{:03}', caption='x', order=('txt', 'jpg')),
  ],
)
def test_images_are_known_again_in_other_shards(trained, tmp_path, options):
  for again, apart in (([70, 71, 17, 72], None), ([70, 71, 17, 2], False), (range(30), False)):
    write_shard(tmp_path / 'again/a.tar', again, **options)
    assert relation(trained, TarShards(tmp_path / 'again')) is apart


def test_shards_without_an_image_in_common_are_apart(trained, tmp_path):
  """Though they bear the same names, keys and captions, and their images the same sizes."""
  write_shard(tmp_path / 'test/00000.tar', range(10))
  same_size = lambda content, last: content[:-3] + last
  with tarfile.open(tmp_path / 'test/00000.tar', 'w') as tar:
    for number in range(10):
      for extension, content in (
        ('jpg', same_size(picture(number), b'abc')),
        ('txt', f'caption {number}'.encode()),
      ):
        info = tarfile.TarInfo(f'{number:05}.{extension}')
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  assert relation(trained, TarShards(tmp_path / 'test')) is True


@pytest.mark.parametrize('keep', ['one', 'all'])
def test_duplicates_of_what_was_kept_are_not_apart_from_it(tmp_path, keep):
  """They were left out, or are read in some steps only: they look like what is trained on."""
  write_shard(tmp_path / 'shards/00000.tar', range(10))
  file = _write_manifest(tmp_path / 'shards', firsts=[0, 1, *range(2, 8), 0, 1], keep=keep)
  trained = TarShards(file, image_keys='jpg')
  assert len(trained) == 8 and trained.contents.count == 10
  left_out = TarShards(write_shard(tmp_path / 'other/00000.tar', [8, 9]))
  assert relation(trained, left_out) is False
  assert relation(trained, TarShards(tmp_path / 'shards')) is False
  assert relation(trained, TarShards(write_shard(tmp_path / 'new/00000.tar', [50]))) is True


def test_empty_images_are_not_the_same_image(trained, tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), 'picture', lambda number: b'')
  write_shard(tmp_path / 'shards/00000.tar', range(3))
  write_shard(tmp_path / 'other/00000.tar', range(3))
  assert relation(TarShards(tmp_path / 'shards'), TarShards(tmp_path / 'other')) is True


def test_remote_shards_are_known_again(trained, tmp_path):
  memory = fsspec.filesystem('memory')
  memory.pipe_file('/apart/a.tar', (tmp_path / 'shards/00001.tar').read_bytes())
  content = write_shard(tmp_path / 'other/00000.tar', range(50, 55)).read_bytes()
  memory.pipe_file('/apart/b.tar', content)
  copied, other = TarShards('memory://apart/a.tar'), TarShards('memory://apart/b.tar')
  assert relation(trained, copied) is False
  assert relation(copied, TarShards('memory:///apart/*.tar')) is False
  assert copied.contents.places & TarShards('memory:///apart').contents.places
  assert relation(trained, other) is True and relation(copied, other) is True


def test_what_cannot_be_read_cannot_be_told(trained, tmp_path):
  other = TarShards(write_shard(tmp_path / 'other/00000.tar', range(50, 55)))
  for index in (tmp_path / 'shards').glob('*.npz'):
    index.unlink()
  assert relation(trained, other) is None
  # But a shard that has a place in both is in both.
  (tmp_path / 'link.tar').symlink_to('shards/00001.tar')
  one = TarShards([tmp_path / 'link.tar', tmp_path / 'other/00000.tar'])
  for index in tmp_path.rglob('*.npz'):
    index.unlink()
  assert relation(trained, one) is False


def test_a_large_set_is_read_once_and_some_shards_at_a_time():
  """Ids of the fewer are held; those of the others come and go."""
  read = []

  def part(number):
    read.append(number)
    return np.arange(10, dtype=np.uint64) + np.uint64(10 * number + 1)

  def files(numbers):
    parts = [lambda number=number: part(number) for number in numbers]
    return contents.ImageFiles('tar_shards', str(numbers), frozenset(), parts, 10 * len(parts))

  many = files(range(1000))
  assert data.known_apart(many, files([2000, 2001]))
  assert sorted(read) == [*range(1000), 2000, 2001]
  found = data.compare(many, files([100, 2000, 2001]))
  assert found == (None, '10 of 30 image files are among 10,000')


@pytest.mark.parametrize('size', [1, contents.HEAD, contents.HEAD + 1, 3 * contents.HEAD])
def test_ids_are_of_size_and_first_bytes(tmp_path, size):
  rng = np.random.default_rng(size)
  content = rng.bytes(size)
  head = min(size, contents.HEAD)
  path = lambda content: _write(tmp_path, content)
  first = bytes([content[0] ^ 1]) + content[1:]
  last_of_head = content[: head - 1] + bytes([content[head - 1] ^ 1]) + content[head:]
  same, other, longer, edge, absent = contents.read_image_ids(
    [*map(path, (content, first, content + b'x', last_of_head)), str(tmp_path / 'absent')]
  )
  assert same not in (other, longer, edge) and absent == 0 and same != 0
  # Cut off a file, what the index of a shard has is the same.
  of_shard = contents.image_ids(np.array([size]), np.array([contents.checksum(content[:head])]))
  assert of_shard.dtype == np.uint64 and of_shard[0] == same


def _write(folder, content):
  path = folder / f'{len(list(folder.iterdir()))}'
  path.write_bytes(content)
  return str(path)


# --- image files ----------------------------------------------------------------------


def make_folder(root, numbers, kind='png'):
  for number in numbers:
    path = root / f'train/{number % 2}/{number}.{kind}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number, kind=kind.upper()))
  return data.ImageFolder(str(root), 'train')


def test_image_files_are_known_again(tmp_path):
  trained = make_folder(tmp_path / 'a', range(8))
  (tmp_path / 'link').symlink_to('a')
  assert relation(trained, data.ImageFolder(f'{tmp_path}/link/', 'train')) is False
  assert relation(trained, make_folder(tmp_path / 'b', range(8, 12))) is True
  assert relation(trained, make_folder(tmp_path / 'c', [8, 9, 7])) is None
  assert relation(trained, make_folder(tmp_path / 'd', [8, 7])) is False
  inside = data.ImageList(str(tmp_path), ['absent.png', 'a/train/1/3.png'])
  assert relation(trained, inside) is False
  outside = data.ImageList(str(tmp_path), ['b/train/1/9.png', 'b/train/1/9.png', 'absent.png'])
  assert relation(trained, outside) is True
  assert relation(make_folder(tmp_path / 'b', []), outside) is False


def test_a_folder_that_is_a_part_of_another_is_seen(tmp_path):
  trained = make_folder(tmp_path / 'a', range(8))
  assert relation(trained, data.ImageFolder(str(tmp_path), 'a')) is False


def test_lists_of_images_have_records_and_a_fingerprint(tmp_path):
  make_folder(tmp_path, range(2))
  names = ['train/0/0.png', 'absent.png']
  source = data.ImageList(str(tmp_path), names)
  assert len(source) == 2 and source.class_names == ()
  assert source[0] == {'image': picture(0, kind='PNG'), 'caption': None, 'label': -1}
  with pytest.raises(BadRecord, match='absent.png'):
    source[1]
  before = source.fingerprint
  assert data.ImageList(str(tmp_path), names).fingerprint == before
  assert data.ImageList(str(tmp_path), names[::-1]).fingerprint != before
  (tmp_path / 'absent.png').write_bytes(b'')
  assert data.ImageList(str(tmp_path), names).fingerprint != before


# --- TFDS -----------------------------------------------------------------------------


@pytest.fixture(name='tfds_dir', scope='module')
def _tfds_dir(tmp_path_factory):
  """train: files of 3 and 2 records; test: one of 3."""
  folder = tmp_path_factory.mktemp('tfds')
  prepare(folder)
  shutil.copytree(folder, folder / 'copy')
  os.symlink(folder, folder / 'link')
  return folder


@pytest.mark.parametrize(
  'trained, other, apart',
  [
    ('train', 'train', False),
    ('train', 'train[:40%]', False),
    ('train', 'test', True),
    ('train', 'test[:1]', True),
    ('train+test', 'test[:1]', False),
    ('train[:40%]', 'train[40%:]', True),  # cut inside a file
    ('train[:2]', 'train[2:3]', True),
    ('train[:3]', 'train[3:]', True),
    ('train[:3]', 'train[2:]', False),
    ('train[2:]', 'train[2:3]', False),
    ('train[:1]+train[4:]', 'train[1:4]', True),
    ('train[:1]+train[4:]', 'train[3:]', False),
  ],
)
def test_splits_are_told_apart_by_record(tfds_dir, trained, other, apart):
  for place in ('', 'copy', 'link'):
    a = TfdsSource('pairs', trained, str(tfds_dir))
    b = TfdsSource('pairs:1.0.0', other, str(tfds_dir / place), label_key=None)
    assert relation(a, b) is apart


def test_other_builds_and_other_data_sets_cannot_be_told_apart(tfds_dir, tmp_path):
  trained = TfdsSource('pairs', 'train', str(tfds_dir))
  prepare(tmp_path, name='others')
  assert relation(trained, TfdsSource('others', 'test', str(tmp_path))) is None
  # The same name and version, but cut otherwise into splits.
  prepare(tmp_path, records=[example(i) for i in range(9)])
  assert relation(trained, TfdsSource('pairs', 'test', str(tmp_path))) is None
  assert relation(trained, TfdsSource('pairs', 'train', str(tmp_path))) is None


def test_other_versions_cannot_be_told_apart(tfds_dir, tmp_path):
  folder = prepare(tmp_path)
  newer = folder.with_name('2.0.0')
  shutil.copytree(folder, newer)
  info = newer / 'dataset_info.json'
  info.write_text(info.read_text().replace('1.0.0', '2.0.0'))
  source = TfdsSource('pairs:2.0.0', 'test', str(tmp_path))
  assert relation(TfdsSource('pairs', 'train', str(tfds_dir)), source) is None


# --- kinds ----------------------------------------------------------------------------


def test_kinds_of_files_cannot_be_told_apart_and_drawn_ones_can(trained, tfds_dir, tmp_path):
  files = [
    trained,
    TfdsSource('pairs', 'train', str(tfds_dir)),
    make_folder(tmp_path / 'images', range(100, 104)),
  ]
  drawn = [kind(split='train', size=9, image_size=8) for kind in (Scenes, Textures)]
  assert [source.contents.kind for source in drawn] == list(contents.GENERATED)
  for i, a in enumerate(files):
    assert all(relation(a, source) is True for source in drawn)
    for b in files[:i]:
      assert relation(a, b) is None

