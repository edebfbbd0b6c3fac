"""Planted duplicates: which are found, which by design are not, and what becomes of them."""

import io
import itertools
import json
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from dpcap.data import tar_manifest
from dpcap.data.source import read_each
from dpcap.data.tar_shards import TarShards
from tools import bench_duplicates, deduplicate, index_shards
from tools.dedup_parts import near, pictures


def drawing(seed: int) -> Image.Image:
  """Some dark shapes on a light ground, 64 x 64."""
  rng = np.random.default_rng(seed)
  image = Image.new('RGB', (64, 64), (250, 250, 245))
  draw = ImageDraw.Draw(image)
  for kind in rng.integers(3, size=6):
    x, y = rng.integers(2, 40, size=2).tolist()
    color, width = tuple(rng.integers(0, 120, size=3).tolist()), int(rng.integers(8, 22))
    box = (x, y, x + width, y + int(rng.integers(8, 22)))
    (draw.ellipse, draw.rectangle, draw.line)[kind](box, color, *([4] if kind == 2 else []))
  return image


def button(letter: str) -> Image.Image:
  """Two of them differ in what is written on them."""
  image = Image.new('RGB', (64, 64), 'white')
  draw = ImageDraw.Draw(image)
  draw.rounded_rectangle((4, 4, 60, 60), 8, 'white', 'black', 2)
  draw.text((26, 22), letter, 'black', font_size=14)
  return image


def coloured(image: Image.Image) -> Image.Image:
  """Dark becomes dark blue, light stays light."""
  return ImageOps.colorize(image.convert('L'), (10, 30, 160), (255, 255, 255))


def encode(image: Image.Image, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, **{'format': 'PNG'} | options)
  return file.getvalue()


COPIES = {
  'the same file': lambda image: encode(image),
  'other bytes, the same pixels': lambda image: encode(image, format='WEBP', lossless=True),
  'jpeg': lambda image: encode(image, format='JPEG', quality=30),
  'half its size': lambda image: encode(image.resize((32, 32), Image.Resampling.BICUBIC)),
  'larger and jpeg': lambda image: encode(image.resize((200, 150)), format='JPEG', quality=60),
  'lighter': lambda image: encode(image.point(lambda value: 80 + value // 2)),
  'grey': lambda image: encode(image.convert('L')),
  'of other colours': lambda image: encode(coloured(image)),
}
OTHERS = {
  'mirrored': lambda image: encode(ImageOps.mirror(image)),
  'turned': lambda image: encode(image.transpose(Image.Transpose.ROTATE_90)),
  'cut': lambda image: encode(image.crop((8, 8, 64, 64))),
  'negative': lambda image: encode(ImageOps.invert(image)),
}


def look_at(files) -> pictures.Pictures:
  return pictures.Pictures(*map(np.array, zip(*map(pictures.look_at, files))))


@pytest.mark.parametrize('bits', [4, 6])
def test_copies_are_found_and_other_pictures_are_not(bits):
  files, expected = [], []
  for seed in range(12):
    first = len(files)
    files += [encode(drawing(seed)), *(copy(drawing(seed)) for copy in COPIES.values())]
    expected += [first] * (1 + len(COPIES))
    for other in OTHERS.values():
      expected.append(len(files))
      files.append(other(drawing(seed)))
  exact, firsts = near.find_groups(look_at(files), bits)
  names = ['itself', *COPIES, *OTHERS] * 12
  wrong = [(n // 13, names[n]) for n in range(len(files)) if firsts[n] != expected[n]]
  assert not wrong
  same = [n for n in range(len(files)) if names[n] in [*COPIES][:2]]
  assert [n for n in range(len(files)) if exact[n] != n] == same
  assert np.all(exact[same] == firsts[same])


def test_what_differs_in_one_place_is_another_picture():
  letters = look_at([encode(button(letter)) for letter in '12357'])
  # The hashes, from afar, say otherwise.
  hashes = near.hashes(letters.thumbnails)
  assert np.bitwise_count(hashes[:, None] ^ hashes).max() <= 6
  assert near.find_groups(letters, 6)[1].tolist() == [0, 1, 2, 3, 4]


def test_what_shows_nothing_is_alike_only_if_it_is_the_same():
  blank = [encode(Image.new('RGB', (16, 16), color)) for color in ('white', 'black', (9, 9, 8))]
  for light in (255, 9):
    image = Image.new('L', (16, 16), light)
    image.paste(light - 1, (8, 0, 16, 16))
    blank.append(encode(image))
  assert near.find_groups(look_at([*blank, blank[0]]), 6)[1].tolist() == [0, 1, 2, 3, 4, 0]


def test_what_cannot_be_decoded_is_like_nothing():
  zeros = pictures.Pictures(np.zeros(3, np.uint64), np.zeros((3, 16, 16), np.uint8))
  exact, firsts = near.find_groups(zeros, 6)
  assert exact.tolist() == firsts.tolist() == [0, 1, 2]


@pytest.mark.parametrize('bits', [0, 1, 4, 6])
def test_all_close_pairs_are_found_once(bits):
  rng = np.random.default_rng(bits)
  hashes = np.repeat(rng.integers(2**64, size=30, dtype=np.uint64), 6)
  for number in range(len(hashes)):
    for bit in rng.integers(64, size=rng.integers(6)):
      hashes[number] ^= np.uint64(1) << np.uint64(bit)
  found = [
    tuple(sorted(pair))
    for a, b in near.close_pairs(hashes, bits)
    for pair in zip(a.tolist(), b.tolist())
  ]
  close = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
  assert sorted(found) == [p for p in itertools.combinations(range(len(hashes)), 2) if close[p]]
  assert len(found) > 5


# --- the program ----------------------------------------------------------------------


def write_shard(path, files) -> None:
  with tarfile.open(path, 'w') as tar:
    for number, content in enumerate(files):
      for extension, data in (('png', content), ('txt', f'{path.stem}{number}'.encode())):
        info = tarfile.TarInfo(f'{number:03}.{extension}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def run(capsys, *arguments, program=deduplicate) -> tuple[int, dict, str]:
  status = program.main([str(argument) for argument in arguments])
  out, errors = capsys.readouterr()
  return status, json.loads(out) if out else {}, errors


@pytest.fixture
def manifest(tmp_path, capsys):
  """Shards a (pictures 0, 1, 2 and one that is none) and b (a JPEG of 1, 3, 0, 1 mirrored)."""
  one = drawing(1)
  shards = {
    'a': [encode(drawing(0)), encode(one), encode(drawing(2)), b'no picture'],
    'b': [COPIES['jpeg'](one), encode(drawing(3)), encode(drawing(0)), OTHERS['mirrored'](one)],
  }
  for name, files in shards.items():
    write_shard(tmp_path / f'{name}.tar', files)
  run(capsys, tmp_path, '--executor=threads', program=index_shards)
  return tmp_path / 'manifest.json'


def test_which_copies_are_found_is_measured(manifest, capsys):
  status, found, _ = run(capsys, manifest, '--pictures=8', program=bench_duplicates)
  assert status == 0 and found['pictures'] == 7
  assert found['found'].keys() == bench_duplicates.COPIES.keys()
  assert found['found']['grey'] == found['found']['JPEG 85'] == 1
  assert found['found']['negative'] == 0
  assert run(capsys, manifest, '--bits=9', program=bench_duplicates)[0] == 2


def test_a_manifest_of_groups(manifest, capsys, tmp_path):
  sheet = tmp_path / 's.private.png'
  status, summary, _ = run(capsys, manifest, f'--sheet={sheet}', '--executor=threads')
  assert status == 0
  expected = {'records': 8, 'undecodable': 1, 'exact_copies': 1, 'near_copies': 1, 'read': 2}
  expected |= {'groups_of_several': 2, 'largest': [2, 2, 1, 1, 1], 'examples': 6, 'keep': 'all'}
  assert {key: summary[key] for key in expected} == expected
  source = TarShards(summary['manifest'])
  assert [r['caption'].decode() for r in source] == ['a0', 'a1', 'a2', 'a3', 'b1', 'b3']
  drawn = set()
  for seed in range(20):
    rngs = [np.random.default_rng([seed, i]) for i in range(6)]
    drawn.update(record['caption'].decode() for record in read_each(source, range(6), rngs))
  assert drawn == {'a0', 'a1', 'a2', 'a3', 'b0', 'b1', 'b2', 'b3'}
  assert np.asarray(Image.open(sheet))[0, 0].tolist() == [250, 250, 245]


def test_one_of_each_group_is_kept_and_nothing_is_read_twice(manifest, capsys, monkeypatch):
  assert run(capsys, manifest, '--part=1/2', '--executor=threads')[1] | {'seconds': 0} == {
    **{'shards': 1, 'read': 1, 'seconds': 0}
  }
  assert not list(manifest.parent.glob('*.keep_*'))
  status, summary, _ = run(capsys, manifest, '--keep=one', '--workers=1', '--executor=threads')
  assert status == 0 and summary['read'] == 1 and summary['manifest'].endswith('.keep_one.json')
  monkeypatch.setattr(pictures, 'look_at', lambda _: pytest.fail('read again'))
  out = manifest.parent / 'again.json'
  again = run(capsys, manifest, out, '--keep=one', '--executor=threads')[1]
  assert again['read'] == 0 and again['examples'] == summary['examples'] == 6
  source = TarShards(out)
  rngs = [np.random.default_rng(i) for i in range(6)]
  read = [record['caption'].decode() for record in read_each(source, range(6), rngs)]
  assert read == ['a0', 'a1', 'a2', 'a3', 'b1', 'b3']


def test_a_shard_that_changed_is_read_again(manifest, capsys):
  before = run(capsys, manifest, '--executor=threads')[1]
  write_shard(manifest.parent / 'b.tar', [encode(drawing(seed)) for seed in range(9)])
  status, _, errors = run(capsys, manifest, '--executor=threads')
  assert status == 2 and 'changed after this manifest was written' in errors
  run(capsys, manifest.parent, '--executor=threads', program=index_shards)
  after = run(capsys, manifest, '--executor=threads')[1]
  assert (before['read'], after['read']) == (2, 1)
  assert after['records'] == 13 and after['exact_copies'] == 3


def test_shards_in_a_store(manifest, capsys):
  store = fsspec.filesystem('memory')
  try:
    for file in manifest.parent.glob('*.tar'):
      store.pipe_file(f'/near/{file.name}', file.read_bytes())
    command = ('memory://near/*.tar', '--index_dir=memory://near/index')
    path = run(capsys, *command, program=index_shards)[1]['manifest']
    status, summary, _ = run(capsys, path)
    assert status == 0 and summary['examples'] == 6
    assert summary['manifest'] == 'memory://near/index/manifest.keep_all.json'
    source = TarShards(summary['manifest'])
    assert [r['caption'].decode() for r in source] == ['a0', 'a1', 'a2', 'a3', 'b1', 'b3']
    assert run(capsys, path)[1]['read'] == 0
  finally:
    store.rm('/near', recursive=True)


def test_processes_read_what_threads_do(manifest, capsys):
  assert run(capsys, manifest, '--executor=processes', '--workers=1')[1]['near_copies'] == 1


@pytest.mark.parametrize(
  'arguments, reason',
  [
    (['--bits=9'], '--bits=9 must be 0 to 8'),
    (['--workers=0'], '--workers=0 must be'),
    (['--keep=two'], 'two'),
    (['--project=x'], "unrecognized arguments: --project=x"),
    (['--part=2/2'], '--part=2/2 must be K/N'),
    (['--part=-1/2'], '--part=-1/2 must be K/N'),
    (['--sheet=a.png'], 'sheet is a.png; it must end in .private.png'),
    (['out.txt'], 'out is out.txt; it must end in .json'),
  ],
)
def test_wrong_options_are_told_in_one_line(manifest, capsys, arguments, reason):
  status, _, errors = run(capsys, manifest, *arguments)
  assert status == 2 and reason in errors and errors.count('\n') == 1


def test_wrong_manifests_are_told_in_one_line(manifest, capsys):
  status, summary, _ = run(capsys, manifest, '--executor=threads')
  for name, reason in (
    (summary['manifest'], 'which has groups; give the one without'),
    (manifest.parent / 'nowhere.json', 'it cannot be read'),
  ):
    status, _, errors = run(capsys, name)
    assert status == 2 and reason in errors and errors.count('\n') == 1
  status, _, errors = run(capsys, manifest, manifest)
  assert status == 2 and 'which is MANIFEST' in errors


def test_a_picture_that_ends_its_reader_is_told(manifest, capsys, monkeypatch):
  def broken(*_):
    raise deduplicate.concurrent.futures.process.BrokenProcessPool('died')
    yield

  run(capsys, manifest, '--part=0/2', '--executor=threads')
  monkeypatch.setattr(deduplicate, 'run_each', broken)
  status, _, errors = run(capsys, manifest)
  assert status == 2 and 'in one of' in errors and 'a.tar' not in errors and 'b.tar' in errors


def test_no_shards_no_groups(tmp_path, capsys):
  tar_manifest.write(str(tmp_path / 'm.json'), [], index_shards.make_wanted(None, 'txt', None))
  status, _, errors = run(capsys, tmp_path / 'm.json')
  assert status == 2 and 'lists no shard' in errors
