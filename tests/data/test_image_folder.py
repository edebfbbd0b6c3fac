"""Images in class folders."""

import numpy as np
import pytest
from PIL import Image

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError


@pytest.fixture(name='root')
def _root(tmp_path):
  for name, shade in (('b', 10), ('a b', 200)):
    folder = tmp_path / 'train' / name
    folder.mkdir(parents=True)
    for i in range(2):
      Image.fromarray(np.full((5, 6, 3), shade + i, np.uint8)).save(folder / f'{i}.PNG')
  (tmp_path / 'train' / 'b' / 'notes.txt').write_text('no image')
  (tmp_path / 'train' / '.hidden').mkdir()
  return tmp_path


def make(root, split='train'):
  return data.make_source('image_folder', image_size=8, path=str(root), split=split)


def test_labels_are_places_among_the_sorted_folders(root):
  source = make(root)
  assert source.class_names == ('a b', 'b') and len(source) == 4
  transform = data.Transform(4, 8, tokenizer=None)
  shades = [int(transform.view(source[i]['image'])[0, 0, 0]) for i in range(4)]
  assert shades == [200, 201, 10, 11]
  assert [source[i]['label'] for i in range(4)] == [0, 0, 1, 1]
  with pytest.raises(IndexError):
    source[4]


def test_the_fingerprint_is_of_the_images(root):
  before = make(root).fingerprint
  assert make(root).fingerprint == before
  (root / 'train/b/1.PNG').write_bytes(b'x')
  assert make(root).fingerprint != before


def test_damage_is_survived(root):
  source = make(root)
  (root / 'train/b/0.PNG').write_bytes(b'no image')
  (root / 'train/b/1.PNG').unlink()
  transform = data.Transform(4, 8, tokenizer=None)
  labels = data.EvaluationBatches(source, transform, 8)[0].labels
  assert labels.tolist() == [0, 0, -1, -1]
  with pytest.raises(BadRecord, match='1.PNG'):
    source[3]


def test_wrong_folders_are_refused(root):
  with pytest.raises(UserError, match='test: no such folder; .* has train'):
    make(root, 'test')
  (root / 'train' / 'empty').mkdir()
  with pytest.raises(UserError, match='empty: a class without an image'):
    make(root)
  (root / 'val').mkdir()
  with pytest.raises(UserError, match='val: no class folders'):
    make(root, 'val')
