"""Scenes are a function of the index, and their captions tell the truth."""

import pickle

import numpy as np
import pytest

from dpcap.data import scenes
from dpcap.data.text import make_tokenizer
from dpcap.errors import UserError


def _source(**changes):
  return scenes.Scenes(**dict(split='train', size=1000, image_size=32) | changes)


def test_a_record_depends_on_split_and_index_alone():
  small, large = _source(), pickle.loads(pickle.dumps(_source(size=10**9)))
  for index in (0, 7, 999):
    a, b = small[index], large[index]
    np.testing.assert_array_equal(a['image'], b['image'])
    assert (a['caption'], a['label']) == (b['caption'], b['label'])
  assert not np.array_equal(small[0]['image'], small[1]['image'])
  assert not np.array_equal(small[0]['image'], _source(split='test')[0]['image'])


def test_scene_has_one_large_object_in_cells_of_their_own():
  counts = []
  for index in range(400):
    scene = _source().scene(index)
    counts.append(len(scene.things))
    assert sum(thing.size == 'large' for thing in scene.things) == 1
    cells = {(thing.x > 0.5, thing.y > 0.5) for thing in scene.things}
    assert len(cells) == len(scene.things)
    for thing in scene.things:
      assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 1e-9
  assert np.all(np.bincount(counts, minlength=5)[1:] > 60)


def test_relations_hold_in_the_picture():
  seen = set()
  for index in range(300):
    scene = _source().scene(index)
    for a, b, relation in zip(scene.things, scene.things[1:], scene.relations):
      seen.add(relation)
      holds = {'left of': a.x < b.x, 'right of': a.x > b.x, 'above': a.y < b.y, 'below': a.y > b.y}
      assert holds[relation], (index, relation)
  assert len(seen) == 4


def test_the_named_colour_is_where_the_object_is():
  source = _source(image_size=64)
  for index in range(100):
    image = source[index]['image'].astype(float)
    for thing in source.scene(index).things:
      if thing.shape == 'ring':
        continue
      column, row = int(thing.x * 64), int(thing.y * 64)
      pixel = image[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
      distances = {name: np.abs(pixel - rgb).sum() for name, rgb in scenes.COLORS.items()}
      assert distances[thing.color] <= min(distances.values()) + 60, (index, thing)


def test_captions_and_labels_agree_with_the_scene():
  for label, (names, _) in scenes.LABELS.items():
    source = _source(label=label)
    assert source.class_names == names
  for index in range(50):
    scene = _source().scene(index)
    text = scenes.caption(scene)
    assert text == _source()[index]['caption']
    assert text.count('large') == 1
    assert sum(text.count(f' {size} ') for size in scenes.SIZES) == len(scene.things)
    name = lambda label, i=index: scenes.LABELS[label][0][_source(label=label)[i]['label']]
    assert f'large {name("color")} {name("shape")}' in text
    assert name('count') == str(len(scene.things))
    assert name('color_shape') == f'{name("color")} {name("shape")}'


def test_vocabulary_is_that_of_the_grammar():
  tokenizer = make_tokenizer('wordpiece', scenes.VOCABULARY_FILE)
  for index in range(200):
    text = _source()[index]['caption']
    ids = tokenizer.encode(text, 24)
    assert tokenizer.decode(ids) == text  # nothing unknown, nothing cut off


def test_bad_arguments_are_refused():
  for changes in (dict(split='dev'), dict(label='mood'), dict(size=0), dict(image_size=0)):
    with pytest.raises(UserError, match=str(next(iter(changes.values())))):
      _source(**changes)
  with pytest.raises(IndexError):
    _source()[1000]
