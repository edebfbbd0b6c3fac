"""Textures are a function of the index, differ from each other, and their captions can be read."""

import pathlib
import pickle

import numpy as np
import pytest

from dpcap.data import texture_fields, texture_programs, textures
from dpcap.data.text import make_tokenizer
from dpcap.errors import UserError

_FIELDS = {**texture_fields.MOVES, **texture_fields.PATTERNS}


def _source(**changes):
  return textures.Textures(**dict(split='train', size=100_000, image_size=32) | changes)


def test_a_record_depends_on_split_index_and_programs_alone():
  small, large = _source(), pickle.loads(pickle.dumps(_source(size=10**9)))
  large[5]  # what was drawn before does not count
  for index in (0, 7, 99_999):
    a, b = small[index], large[index]
    np.testing.assert_array_equal(a['image'], b['image'])
    assert (a['caption'], a['label']) == (b['caption'], b['label'])
  assert small.fingerprint != _source(programs=5).fingerprint


@pytest.mark.parametrize('size', [1, 32, 60, 224])
def test_images_have_any_size(size):
  image = _source(image_size=size)[3]['image']
  assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous


def test_a_small_image_is_the_large_one_shrunk():
  large = _source(image_size=128)[3]['image'].reshape(32, 4, 32, 4, 3).mean((1, 3))
  assert np.abs(large - _source()[3]['image']).max() <= 1


def test_splits_share_neither_programs_nor_views():
  splits = [_source(split=split) for split in ('train', 'validation', 'test')]
  programs = [source.program(index) for source in splits for index in range(100)]
  assert len(set(programs)) == 300
  views = [texture_programs.draw_view(source._rng(i)) for source in splits for i in range(100)]
  assert len(set(views)) == 300


def test_programs_come_again_in_other_views():
  source = _source(programs=10)
  assert source.program(3) == source.program(13) != source.program(4)
  assert len({source.program(index) for index in range(100)}) == 10
  a, b, other = source[3], source[13], source[4]
  assert a['caption'] == b['caption'] and a['label'] == b['label']
  assert a['caption'] != other['caption']
  difference = np.abs(a['image'].astype(int) - b['image']).mean()
  assert difference > 5


def test_images_have_contrast_and_differ():
  images = np.stack([_source()[index]['image'] for index in range(300)]).astype(np.float32)
  assert images.std((1, 2)).max(1).min() > 8  # in at least one of the colours
  pixels = images.reshape(300, -1)
  squares = (pixels**2).sum(1)
  distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * pixels @ pixels.T, 0) / 3072)
  assert (distances + 1000 * np.eye(300)).min() > 15
  # All hues and brightnesses, fine and coarse.
  means = images.mean((1, 2))
  assert means.std(0).min() > 30
  steps = np.abs(np.diff(images.mean(-1), axis=2)).mean((1, 2)) / images.mean(-1).std((1, 2))
  low, high = np.quantile(steps, [0.05, 0.95])
  assert high > 3 * low


def test_power_falls_with_frequency_as_in_photographs():
  size = 128
  images = [_source(image_size=size)[index]['image'].mean(-1) for index in range(60)]
  window = np.outer(np.hanning(size), np.hanning(size))
  spectra = [np.abs(np.fft.fft2((image - image.mean()) * window)) ** 2 for image in images]
  frequency = np.fft.fftfreq(size) * size
  ring = np.round(np.hypot(frequency[:, None], frequency)).astype(int).ravel()
  power = np.bincount(ring, np.mean(spectra, 0).ravel()) / np.bincount(ring)
  used = np.arange(2, size // 2)
  slope = np.polyfit(np.log(used), np.log(power[used]), 1)[0]
  assert -2.7 < slope < -1.5


@pytest.mark.parametrize('name', _FIELDS)
def test_fields_are_finite_float32_and_change_from_place_to_place(name):
  axis = (np.arange(64, dtype=np.float32) + 0.5) / 64 - 0.5
  u, v = texture_fields.turned(axis[None, :], axis[:, None], 0.3, 1.0)
  if name in texture_fields.PATTERNS:
    u, v = u * 6, v * 6
  kept = u.copy(), v.copy()
  for knobs in np.random.default_rng(0).random((8, 4)).tolist():
    found = _FIELDS[name](u, v, tuple(knobs), 0.4)
    for field in found if isinstance(found, tuple) else (found,):
      assert field.dtype == np.float32 and np.isfinite(field).all()
      assert field.std() > 0.02
  np.testing.assert_array_equal((u, v), kept)


def test_every_operation_and_colour_is_drawn_and_labels_tell_the_upper_pattern():
  source = _source()
  labels, words = set(), set()
  for index in range(400):
    program = source.program(index)
    words.update(texture_programs.caption(program).split())
    labels.add(program.layers[0].pattern.name)
  assert labels == set(source.class_names)
  vocabulary = pathlib.Path(textures.VOCABULARY_FILE).read_text().split()
  assert words == set(vocabulary) - {'[PAD]', '[UNK]', '[CLS]', '[SEP]'}
  for index in range(20):
    pattern = source.program(index).layers[0].pattern.name
    assert source.class_names[source[index]['label']] == pattern
    assert pattern in source[index]['caption'].split(' in ')[0]


def test_captions_can_be_read_back():
  tokenizer = make_tokenizer('wordpiece', textures.VOCABULARY_FILE)
  texts = [texture_programs.caption(_source().program(index)) for index in range(300)]
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text, 40)) == text  # nothing unknown, nothing cut
  assert len(set(texts)) > 290


def test_bad_arguments_are_refused():
  for changes in (dict(split='dev'), dict(size=0), dict(image_size=0), dict(programs=0)):
    with pytest.raises(UserError, match=f'textures: {next(iter(changes))} is'):
      _source(**changes)
  with pytest.raises(IndexError):
    _source()[100_000]
