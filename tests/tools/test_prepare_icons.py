"""Icons to shards: what becomes a record, which split it goes to, the same bytes every time."""

import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from dpcap.data.tar_shards import TarShards
from dpcap.data.text import make_tokenizer
from tools import prepare_icons
from tools.icon_parts import drawing, splits
from tools.icon_parts.vocabulary import make_vocabulary

# Draws what `at` and `gray` say, which stand for shapes: tests need no renderer.
_RENDERER = """
import io, os, re
from PIL import Image
def svg_to_bytes(svg_string, background, skip_system_fonts):
  side = int(re.search(r' width="(\\d+)"', svg_string)[1])
  image = Image.new('RGB', (side, side), background)
  found = re.search(r'<p at="(\\d+)" gray="(\\d+)"/>', svg_string)
  if not found:
    raise ValueError('broken')
  if found[2] == '13':
    os._exit(1)
  image.paste((int(found[2]),) * 3, (int(found[1]), 0, side, side))
  out = io.BytesIO()
  image.save(out, 'PNG')
  return out.getvalue()
"""


@pytest.fixture
def renderer(tmp_path, monkeypatch):
  """A renderer in the place of resvg, also in other processes."""
  folder = tmp_path / 'site'
  (folder / 'resvg_py-0.5.0.dist-info').mkdir(parents=True)
  (folder / 'resvg_py-0.5.0.dist-info/METADATA').write_text('Name: resvg-py\nVersion: 0.5.0\n')
  (folder / 'resvg_py.py').write_text(_RENDERER)
  monkeypatch.delitem(sys.modules, 'resvg_py', raising=False)
  monkeypatch.syspath_prepend(str(folder))
  yield
  sys.modules.pop('resvg_py', None)


def icon(at: int, gray: int = 0, **others) -> dict:
  return {'body': f'<p at="{at}" gray="{gray}"/>', **others}


def design_set(icons: dict, aliases: dict | None = None) -> dict:
  return {'icons': icons, 'aliases': aliases or {}, 'width': 24, 'height': 24}


SETS = {
  'plain': design_set(
    {
      'calendar-check': icon(1),
      'tree-and-cloud': icon(2),  # two concepts: no label
      'gone': icon(3, hidden=True),
      'white': icon(4, gray=255),
      'wrong': {'body': '<path'},
      'file': {'body': '<image href="/etc/passwd"/>'},
      'deep': {'body': '<g>' * 500 + '</g>' * 500},
      'swirl': icon(5),
      'swirl-2': icon(5),  # the same picture
    },
    {
      'event_ok': {'parent': 'calendar-check'},
      'event-again': {'parent': 'event_ok'},
      'turned': {'parent': 'calendar-check', 'rotate': 1},
      'ghost': {'parent': 'gone'},
      'snake': {'parent': 'tail'},
      'tail': {'parent': 'snake'},
    },
  ),
  'tabler': design_set({'moon': icon(6), 'nameless': icon(7), 'tree': icon(1)}),
  'jam': design_set({'sun-2': icon(8), 'moon': icon(6)}),
  'solar': design_set({'moon': icon(9)}),
  'closed': design_set({'moon': icon(10)}),
}


def write_package(folder, **changed) -> None:
  """The folder of a package of SETS, some of them changed: name=JSON text."""
  (folder / 'json').mkdir(parents=True)
  (folder / 'package.json').write_text('{"name": "@iconify/json", "version": "2.0.1"}')
  collections = {}
  for name, content in SETS.items():
    (folder / f'json/{name}.json').write_text(changed.get(name) or json.dumps(content))
    spdx = 'GPL-3.0' if name == 'closed' else 'MIT'
    collections[name] = {'total': 3, 'author': {'name': f'A {name}'}, 'license': {'spdx': spdx}}
  (folder / 'collections.json').write_text(json.dumps(collections))


def pack(folder, file) -> None:
  with tarfile.open(file, 'w:gz') as tar:
    tar.add(folder, 'package')


def run(capsys, *arguments) -> tuple[int, dict, str]:
  status = prepare_icons.main([str(argument) for argument in arguments])
  out, errors = capsys.readouterr()
  return status, json.loads(out) if out else {}, errors


def records(out, split) -> dict[str, tuple]:
  """(captions, label) by icon, as a source reads them."""
  path = str(out / split / 'manifest.json')
  source = TarShards(path, caption_key='json:captions', label_key='label')
  with tarfile.open(out / split / '00000.tar') as tar:
    names = [json.load(tar.extractfile(m))['icon'] for m in tar if m.name.endswith('.json')]
  name = lambda label: source.class_names[label] if label >= 0 else None
  return {n: (r['caption'], name(r['label'])) for n, r in zip(names, source, strict=True)}


def test_a_package_becomes_splits_the_same_however_it_is_run(tmp_path, renderer, capsys):
  whole, damaged, later = (tmp_path / name for name in ('whole', 'damaged', 'later'))
  write_package(whole)
  write_package(damaged, tabler='{"icons": ')
  write_package(later, plain='{"not": "read again"}')
  pack(damaged, tmp_path / 'damaged.tgz')

  one, two = tmp_path / 'one', tmp_path / 'two'
  status, summary, _ = run(capsys, whole, one, '--side=16', '--workers=1')
  assert status == 0
  status, _, errors = run(capsys, tmp_path / 'damaged.tgz', two, '--side=16', '--workers=1')
  assert status == 2 and 'json/tabler.json is no design set' in errors
  assert (two / 'drawn/plain.json').exists()
  assert run(capsys, later, two, '--side=16', '--workers=2')[1] == summary
  for split in splits.SPLITS:
    assert (one / split / '00000.tar').read_bytes() == (two / split / '00000.tar').read_bytes()
  assert not (two / 'drawn').exists()
  assert run(capsys, later, two, '--side=16')[1] == summary  # nothing left to do
  status, _, errors = run(capsys, whole, two, '--side=32')
  assert status == 2 and "'side': 16" in errors and 'give another folder' in errors

  assert records(one, 'train') == {
    'calendar-check': (['calendar check', 'event ok', 'event again'], 'calendar'),
    'tree-and-cloud': (['tree and cloud'], None),
    'swirl': (['swirl', 'swirl 2'], None),
  }
  # tabler's tree is a picture of train's, jam's moon one of test's.
  assert records(one, 'test') == {'moon': (['moon'], 'moon')}
  assert records(one, 'probe') == {'sun-2': (['sun 2'], 'sun')}
  counts = {'sets': 1, 'pictures': 3, 'captions': 6, 'labelled': 1, 'shards': 1}
  assert summary['splits']['train'] == counts
  assert summary['left_out_by_set'] == {
    'plain': {
      **{'blank': 1, 'broken': 1, 'hidden': 1, 'nested too deep': 1, 'refers to a file': 1},
      'same picture as another of the set': 1,
    }
  }
  assert summary['left_out']['same picture as in another split'] == 2
  assert summary['left_out']['without a label'] == 1
  tokenizer = make_tokenizer('wordpiece', str(one / 'vocabulary.txt'))
  assert summary['vocabulary'] == tokenizer.vocab_size
  assert tokenizer.decode(tokenizer.encode('Calendar 2', 9)) == 'calendar 2'
  page = (one / 'DATA.md').read_text()
  assert (
    '| split | design sets | pictures | captions | labelled | shards |\n'
    '| --- | --- | --- | --- | --- | --- |\n'
    '| train | 1 | 3 | 6 | 1 | 1 |\n'
  ) in page
  assert '| calendar | 1 | 0 | 0 |' in page and '| sun | 0 | 1 | 0 |' in page
  assert '| tabler | A tabler | MIT | test | 1 |' in page
  assert '| solar | A solar | MIT | - | 0 |' in page and '| closed | A closed | GPL-3.0 | -' in page


def test_what_is_wrong_is_said_in_one_line(tmp_path, renderer, capsys, monkeypatch):
  def refused(*arguments) -> str:
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and errors.count('\n') == 1
    return errors

  package, out = tmp_path / 'package', tmp_path / 'out'
  assert 'npm pack @iconify/json' in refused()
  assert 'npm pack @iconify/json' in refused(tmp_path / 'nothing', out)
  assert 'OUT is missing' in refused(package)
  assert '--side=0 must be 8 to 1024' in refused(package, out, '--side=0')
  assert '--workers=0' in refused(package, out, '--workers=0')
  write_package(package)
  (tmp_path / 'site/a.txt').touch()
  assert 'holds something else' in refused(package, tmp_path / 'site')
  pack(package, tmp_path / 'p.tgz')
  cut = tmp_path / 'cut.tgz'
  cut.write_bytes((tmp_path / 'p.tgz').read_bytes()[:300])
  assert 'not a whole tarball' in refused(cut, out)
  deadly = tmp_path / 'deadly'
  write_package(deadly, jam=json.dumps(design_set({'sun': icon(1, gray=13)})))
  assert 'the renderer died on an icon of one of' in refused(deadly, tmp_path / 'out3')
  (package / 'json/jam.json').unlink()
  assert 'it has no json/jam.json' in refused(package, out)
  (package / 'collections.json').unlink()
  assert 'it has no collections.json' in refused(package, tmp_path / 'out2')
  shutil.rmtree(tmp_path / 'site')
  monkeypatch.setattr(prepare_icons.importlib.metadata, 'version', _missing)
  assert "pip install '.[icons]'" in refused(package, out)


def _missing(name):
  raise prepare_icons.importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
  ('captions', 'label'),
  [
    (['calendar check'], 'calendar'),
    (['event', 'my calendar'], 'calendar'),
    (['sun 2', 'sun'], 'sun'),
    (['sun', 'moon'], None),
    (['sunny'], None),
    (['swirl'], None),
  ],
)
def test_a_label_is_the_one_concept_that_captions_hold(captions, label):
  assert drawing.label_of(captions) == label


def test_a_vocabulary_has_what_several_captions_say_and_spells_the_rest():
  captions = ['Phone 2'] * 9 + ['phone phone', 'swirl', 'naïve', 'naïve', 'e-mail', 'e-mail']
  entries = make_vocabulary([*captions, 'swirls', 'swirls'])
  assert entries[:5] == ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  assert len(set(entries)) == len(entries)
  # By how often; one caption is not enough, nor is it for a word within others.
  assert entries[77:79] == ['phone', 'swirls'] and entries[-1] == '##phone'
  assert not {'swirl', '##swirls', 'naïve', 'e-mail'} & set(entries)
  assert {*drawing.CONCEPTS, 'z', '##z', '0', '##9'} <= set(entries)


def test_concepts_are_100_words():
  assert len(set(drawing.CONCEPTS)) == len(drawing.CONCEPTS) == 100
  assert all(word.isalpha() and word.islower() for word in drawing.CONCEPTS)


def test_resvg_draws_the_whole_icon_in_the_middle():
  # Twice as wide as high, and not at the origin: white above and below, all of it in between.
  wide = {'body': '<path d="M4 4h8v4H4z"/>', 'left': 4, 'top': 4, 'width': 8, 'height': 4}
  icons = {'icons': {'wide': wide, 'off': {'body': '<circle cx="99" cy="99" r="1"/>'}}}
  jpeg = drawing.draw(drawing.svg_of(icons, 'wide', 32), 32)
  gray_HxW = np.asarray(Image.open(io.BytesIO(jpeg)).convert('L'))
  assert gray_HxW.shape == (32, 32)
  assert gray_HxW[:7].min() > 230 and gray_HxW[25:].min() > 230 and gray_HxW[9:23].max() < 25
  with pytest.raises(drawing.Unusable, match='blank'):
    drawing.draw(drawing.svg_of(icons, 'off', 32), 32)
