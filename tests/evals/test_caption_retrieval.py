"""Retrieval both ways against a loop over all pairs of an image and a caption."""

import math

import jax
import numpy as np
import pytest

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import caption_retrieval

CAPTIONS = [
  ['a red ring'],
  ['blue', 'a small blue circle'],
  ['A red RING', '', None],  # as tokens the same as the first one's
  None,  # bad
  ['a large white cross above a ring', 'blue'],
  'a green square',
  ['green'],
]


class Pictures:
  """Random pictures with the captions above."""

  class_names, fingerprint = (), 'pictures'

  def __init__(self):
    # Always the same: among others, scores might be too close to each other to be told apart.
    self.images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)

  def __len__(self):
    return len(CAPTIONS)

  def __getitem__(self, index):
    return {'image': self.images[index], 'caption': CAPTIONS[index], 'label': -1}


@pytest.fixture(name='source', scope='module')
def _source():
  return Pictures()


@pytest.fixture(name='result', scope='module')
def _result(subject, source):
  subject = subject._replace(make_source=lambda section: source)
  return caption_retrieval.evaluate(subject, source={}, images=None, at=(1, 2, 50), batch_size=3)


def direct(subject, source):
  """{direction: [how many wrong answers are as good as the best right one, for every query]}."""
  tokenizer = subject.transform.tokenizer
  own = {
    i: {
      tokenizer.encode(c, 24).tobytes() for c in ([given] if isinstance(given, str) else given) if c
    }
    for i, given in enumerate(CAPTIONS)
    if given
  }
  captions = list(dict.fromkeys(text for texts in own.values() for text in sorted(texts)))
  tokens = [np.frombuffer(text, np.int32) for text in captions]
  model = jax.jit(subject.model.apply)
  mean = {
    (i, j): float(model(subject.variables, data.normalize(source.images[i]), tokens[j]))
    for i in own
    for j in range(len(tokens))
  }
  total = {(i, j): loss * np.sum(tokens[j][1:] != 0) for (i, j), loss in mean.items()}
  prior = [
    math.log(sum(math.exp(-total[i, j]) for i in own) / len(own)) for j in range(len(tokens))
  ]
  ratio = {(i, j): -loss - prior[j] for (i, j), loss in total.items()}

  def ranks(score, queries):
    found = []
    for answers in queries:
      right = max(score(pair) for pair in answers if captions[pair[1]] in own[pair[0]])
      wrong = [pair for pair in answers if captions[pair[1]] not in own[pair[0]]]
      found.append(sum(score(pair) >= right for pair in wrong))
    return found

  by_image = [[(i, j) for j in range(len(tokens))] for i in own]
  by_caption = [[(i, j) for i in own] for j in range(len(tokens))]
  return {
    'image_to_text': ranks(lambda pair: -mean[pair], by_image),
    'image_to_text_ratio': ranks(lambda pair: ratio[pair], by_image),
    'text_to_image': ranks(lambda pair: -mean[pair], by_caption),
  }


def test_recall_is_that_of_a_loop_over_all_pairs(subject, source, result):
  assert (
    result.n == 6 and result.details['distinct_captions'] == 6 and result.details['left_out'] == 1
  )
  for direction, ranks in direct(subject, source).items():
    for k in (1, 2, 50):
      found = result.details[direction][str(k)]
      assert found['value'] == pytest.approx(np.mean([rank < k for rank in ranks])), direction
      low, high = found['interval95']
      assert 0 <= low <= found['value'] <= high <= 1
    assert found['value'] == found['chance'] == 1  # among all answers there is a right one
  assert result.metric == 'text_recall_at_1'
  assert result.value == result.details['image_to_text']['1']['value']


def test_chance_counts_all_that_are_right(result):
  # Of six captions two images have two, the others one; two captions are of two images each.
  chance = result.details['image_to_text']['1']['chance']
  assert chance == pytest.approx(np.mean([1, 2, 1, 2, 1, 1]) / 6)
  two = result.details['text_to_image']['2']['chance']
  one_of_two, either_of_two = 1 - 5 / 6 * 4 / 5, 1 - 4 / 6 * 3 / 5
  assert two == pytest.approx((4 * one_of_two + 2 * either_of_two) / 6)


def test_examples_are_of_the_source(result):
  images, captions = result.details['examples']['images'], result.details['examples']['captions']
  assert [entry['image'] for entry in images] == [0, 1, 2, 4, 5, 6]
  assert images[1]['given'] == CAPTIONS[1] and images[2]['given'] == ['a red ring']
  own = {entry['image']: entry['given'] for entry in images}
  for entry in images:
    for ranking in ('image_to_text', 'image_to_text_ratio'):
      assert len(entry[ranking]) == 3
      for answer in entry[ranking]:
        assert answer['right'] == (answer['found'] in entry['given'])
  for entry in captions:
    assert {answer['found'] for answer in entry['text_to_image']} == own.keys()
    for answer in entry['text_to_image']:
      assert answer['right'] == (entry['caption'] in own[answer['found']])


def test_ranks_by_hand():
  losses = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 3.0], [np.nan, np.nan, np.nan]])
  right = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
  found = caption_retrieval.recall(losses, right, (1, 2, 3), independent=2)
  # Second; as likely as a wrong one, so second; nothing is known, so last.
  assert [found[k]['value'] for k in '123'] == [0, 2 / 3, 1]
  assert found['1']['chance'] == pytest.approx(1 / 3)
  narrow = caption_retrieval.recall(losses, right, (2,), independent=9)['2']['interval95']
  wide = found['2']['interval95']
  assert wide[0] < narrow[0] and narrow[1] < wide[1]


def test_a_caption_that_is_likely_anyway_is_no_answer_by_ratio():
  # The first caption is likelier for every image, the second one more so for the second image.
  summed = np.array([[1.0, 9.0], [1.0, 5.0]])
  ratio = caption_retrieval.without_prior(summed)
  assert np.argmin(ratio, axis=1).tolist() == [0, 1]
  np.testing.assert_allclose(np.exp(-ratio).mean(axis=0), 1, rtol=1e-6)


def test_images_are_drawn_from_all_of_the_source():
  numbers = caption_retrieval.choose(1000, 100)
  assert len(set(numbers)) == 100 and numbers.tolist() == sorted(numbers)
  assert max(np.histogram(numbers, 4, (0, 1000))[0]) < 50
  assert numbers.tolist() == caption_retrieval.choose(1000, 100).tolist()
  assert (
    list(caption_retrieval.choose(3, 4)) == [0, 1, 2] == list(caption_retrieval.choose(3, None))
  )


def test_images_of_one_caption_are_refused(subject):
  with pytest.raises(UserError, match='caption_retrieval: the source has not two usable images'):
    caption_retrieval.evaluate(
      subject, source=dict(split='test', size=1), images=None, at=(1,), batch_size=2
    )
