"""What an example holds, and views of a record."""

import numpy as np
import pytest

from dpcap import data
from dpcap.data.source import BadRecord, Record
from dpcap.data.text import BytesTokenizer

_IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def _record(caption='a dog', label=3) -> Record:
  return Record(image=_IMAGE, caption=caption, label=label)


def _transform(**settings) -> data.Transform:
  return data.Transform(4, 8, BytesTokenizer(), **settings)


def _rng(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize('views', [1, 3])
def test_shapes_are_those_of_examples(views):
  transform = _transform(fields=('key', 'image', 'label', 'tokens'), views=views)
  example = {name: np.asarray(x) for name, x in transform(_record(), _rng()).items()}
  assert example.keys() == transform.shapes.keys()
  for name, field in transform.shapes.items():
    assert example[name].shape == field.shape
    assert np.can_cast(example[name].dtype, field.dtype) or name == 'label'
  assert np.all(example['label'] == 3)
  assert example['image'].shape == ((3,) if views == 3 else ()) + (4, 4, 3)


def test_a_record_is_bad_by_what_is_asked_of_it():
  without_caption, without_label = _record(caption=None), _record(label=-1)
  assert _transform(fields=('image', 'label'))(without_caption, _rng())['label'] == 3
  assert 'tokens' in _transform()(without_label, _rng())
  with pytest.raises(BadRecord, match='no caption'):
    _transform()(without_caption, _rng())
  with pytest.raises(BadRecord, match='no label'):
    _transform(fields=('image', 'label'))(without_label, _rng())
  with pytest.raises(BadRecord):
    _transform(fields=('image', 'key'))(Record(image=b'x', caption='a', label=0), _rng())


def test_a_record_that_is_bad_in_some_views_is_bad():
  """One of its captions is blank, and only some views draw that one."""
  record, rng = _record(caption=['a dog', ' ']), _rng()
  assert 0 < sum(_is_bad(record, rng) for _ in range(30)) < 30
  with pytest.raises(BadRecord, match='empty caption'):
    _transform(views=30)(record, _rng())


def _is_bad(record, rng):
  try:
    _transform()(record, rng)
  except BadRecord:
    return True
  return False


def test_the_unit_is_what_a_record_is_to_the_model():
  named = {('image', 'tokens'): 'image-text pair', ('image', 'label'): 'labelled image'}
  assert all(data.unit(fields) == name for fields, name in named.items())
  assert data.unit(('image', 'key')) == 'image'


def test_keys_are_of_64_bits_and_follow_from_the_generator():
  transform = _transform(fields=('key',))
  keys = np.array([transform(_record(), _rng(seed))['key'] for seed in range(200)])
  assert keys.dtype == np.uint32 and len(np.unique(keys, axis=0)) == 200
  # Every bit is set in about half of them.
  bits = np.unpackbits(keys.view(np.uint8), axis=1).mean(0)
  assert np.all((0.3 < bits) & (bits < 0.7))
  np.testing.assert_array_equal(keys[7], transform(_record(), _rng(7))['key'])


def test_views_are_augmented_apart_and_captions_drawn_for_each():
  record = _record(caption=['a', 'b'])
  transform = _transform(crop_scale=(0.2, 1.0), flip=True, views=16)
  example = transform(record, _rng())
  assert len(np.unique(example['image'], axis=0)) > 8
  assert len(np.unique(example['tokens'], axis=0)) == 2
  again = transform(record, _rng())
  assert all(np.array_equal(example[name], again[name]) for name in example)
