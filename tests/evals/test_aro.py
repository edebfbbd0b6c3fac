"""ARO's tests: the choice against whole forwards, one at a time; what false captions are."""

import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.evals import aro

_SOURCE = dict(split='test', size=14)


@pytest.mark.parametrize('test', aro.SCENES_TESTS)
def test_false_captions_have_the_same_words_and_are_no_captions_of_the_scene(test):
  source = data.Scenes('train', 60, 16)
  cases = aro._ScenesCases(source, test)
  asked = 0
  for index in range(len(source)):
    try:
      case = cases[index]
    except BadRecord:
      continue
    asked += 1
    true, *false = case.captions
    assert true == source[index]['caption'] and true not in false and case.group
    assert len(false) == (4 if test == 'order' else 1)
    assert all(sorted(text.split()) == sorted(true.split()) for text in false)
  assert asked > 20


def test_a_case_is_right_where_the_true_caption_has_the_lowest_loss(subject):
  result = aro.evaluate_scenes(subject, source=_SOURCE, test='attributes', batch_size=4)
  cases = aro._ScenesCases(data.Scenes(image_size=16, **_SOURCE), 'attributes')
  loss, right = jax.jit(subject.model.apply), []
  for index in range(len(cases)):
    try:
      case = cases[index]
    except BadRecord:
      continue
    true, false = (
      float(
        loss(
          subject.variables,
          data.normalize(case.image),
          subject.transform.tokenizer.encode(text, 24),
        )
      )
      for text in case.captions
    )
    right.append(true < false)
  assert result.n == len(right) and result.value == pytest.approx(np.mean(right))
  details = result.details
  assert details['chance'] == 0.5 and details['left_out'] == len(cases) - result.n
  groups = details['by_group'].values()
  assert sum(group['n'] for group in groups) == result.n
  assert details['mean_over_groups'] == pytest.approx(np.mean([g['value'] for g in groups]))
  assert details['interval95'][0] <= result.value <= details['interval95'][1]


def test_what_text_length_cuts_off_is_told_beside_the_figure(subject):
  length = 5
  short = subject._replace(transform=dataclasses.replace(subject.transform, text_length=length))
  result = aro.evaluate_scenes(short, source=_SOURCE, test='attributes', batch_size=4)
  encode = subject.transform.tokenizer.encode
  cases = aro._ScenesCases(data.Scenes(image_size=16, **_SOURCE), 'attributes')
  asked = cut = alike = 0
  for index in range(len(cases)):
    try:
      true, false = (encode(text, 100).tolist() for text in cases[index].captions)
    except BadRecord:
      continue
    # [SEP] takes the last place.
    same = true[: length - 1] == false[: length - 1]
    asked, alike = asked + (not same), alike + same
    cut += not same and np.count_nonzero(true) > length
  assert alike and cut
  assert (result.n, result.details['left_out_for_length']) == (asked, alike)
  assert result.details['true_captions_cut'] == cut
  said = f'{cut} of {asked} true ones were cut, {alike} more cases were left out'
  assert said in result.details['note']
  whole = aro.evaluate_scenes(subject, source=_SOURCE, test='attributes', batch_size=4)
  assert whole.n == asked + alike and whole.details['note'] == ''


def _tag(text):
  nouns, adjectives = {'ring', 'square'}, {'small', 'red', 'large', 'blue'}
  part = lambda word: 'noun' if word in nouns else 'adjective' if word in adjectives else ''
  return [(word, part(word)) for word in text.split()]


def test_shuffles_move_what_they_say():
  words = 'a small red ring left of a large blue square above'.split()
  parts = [part for _, part in _tag(' '.join(words))]
  moved = set()
  for _ in range(10):
    first, second, within, threes = (
      text.split() for text in aro.shuffles(' '.join(words), _tag, np.random.default_rng())
    )
    assert all(text != words for text in (first, second, within, threes))
    assert [part for _, part in _tag(' '.join(first))] == parts
    moved |= {part for word, new, part in zip(words, first, parts) if word != new}
    assert [w for w, part in _tag(' '.join(first)) if not part] == [
      w for w, part in zip(words, parts) if not part
    ]
    assert [w for w, part in zip(second, parts) if part] == [
      w for w, part in zip(words, parts) if part
    ]
    cut = lambda text: [tuple(text[i : i + 3]) for i in range(0, len(text), 3)]
    assert [sorted(three) for three in cut(within)] == [sorted(three) for three in cut(words)]
    assert all(' '.join(three) in ' '.join(threes) for three in cut(words))
  assert moved == {'noun', 'adjective'}


@pytest.mark.parametrize('text', ['a red ring', 'red red red red ring of a', ''])
def test_an_order_that_cannot_be_changed_is_no_case(text):
  assert aro.shuffles(text, _tag, np.random.default_rng()) == ()


def test_order_asks_about_every_caption(subject, tmp_path, monkeypatch):
  monkeypatch.setattr(aro, 'spacy_tagger', lambda: _tag)
  pixels = np.random.default_rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'one.png')
  captions = [
    'a small red ring left of a large blue square',
    'a ring',
    'a red square above a blue ring',
  ]
  entries = [
    {'image': 'one.png', 'caption': captions},
    {'image': 'absent.png', 'caption': captions[:1]},
  ]
  path = tmp_path / 'coco.json'
  path.write_text(json.dumps(entries), encoding='utf-8-sig')
  result = aro.evaluate_order(subject, annotations=str(path), images=str(tmp_path), batch_size=4)
  assert (result.n, result.details['left_out'], result.details['chance']) == (2, 2, 0.2)
  path.write_text(json.dumps([{'image': 'one.png', 'caption': 'a'}]))
  with pytest.raises(UserError, match='caption of entry 0 is no list of texts'):
    aro.read_captions(str(path))
  path.write_text(json.dumps([{'image': 'one.png'}]))
  with pytest.raises(UserError, match='entry 0 lacks image or caption'):
    aro.read_captions(str(path))


def test_without_spacy_it_is_asked_for(monkeypatch):
  monkeypatch.setitem(sys.modules, 'spacy', None)
  with pytest.raises(UserError, match='aro_order takes spaCy .*dpcap.aro.*en_core_web_sm'):
    aro.spacy_tagger.__wrapped__()


def _annotation(path, **change):
  return {
    'image_path': path,
    'bbox_x': 4,
    'bbox_y': 6,
    'bbox_w': 10,
    'bbox_h': 8,
    'true_caption': 'a red ring above a blue cross',
    'false_caption': 'a blue cross above a red ring',
    'relation_name': 'above',
  } | change


def test_visual_genome_crops_to_the_box_and_leaves_out_what_cannot_be_used(subject, tmp_path):
  pixels = np.random.default_rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, 'PNG')
  (tmp_path / 'one.png').write_bytes(stream.getvalue())
  entries = [
    _annotation('one.png'),
    _annotation('absent.png'),
    _annotation('one.png', bbox_x=30),  # outside
    _annotation('one.png', relation_name='below'),
  ]
  case = aro._VisualGenomeCases(data.ImageList(str(tmp_path), ['one.png']), entries)[0]
  np.testing.assert_array_equal(case.image, pixels[6:14, 4:14])
  path = tmp_path / 'visual_genome_relation.json'
  path.write_text(json.dumps(entries))
  result = aro.evaluate_visual_genome(
    subject, annotations=str(path), images=str(tmp_path), batch_size=4
  )
  assert result.n == 2 and result.details['left_out'] == 2
  assert set(result.details['by_group']) == {'above', 'below'}
  for entry in entries:
    entry['attributes'] = [entry.pop('relation_name'), 'red']
  path.write_text(json.dumps(entries))
  result = aro.evaluate_visual_genome(
    subject, annotations=str(path), images=str(tmp_path), batch_size=4
  )
  assert result.details['groups_counted'] == 0 and result.details['mean_over_groups'] is None


@pytest.mark.parametrize(
  'text, message',
  [
    ('no json', 'cannot be read'),
    ('[]', 'not empty'),
    ('[{"image_path": "a"}]', 'case 0 lacks bbox_x'),
  ],
)
def test_annotations_are_checked(tmp_path, text, message):
  (tmp_path / 'file.json').write_text(text)
  with pytest.raises(UserError, match=message):
    aro.read_annotations(str(tmp_path / 'file.json'))
