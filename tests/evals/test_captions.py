"""What is counted and listed of the captions that a model writes."""

import jax
import numpy as np
import pytest

from dpcap import data, evals, models
from dpcap.data.text import BytesTokenizer
from dpcap.errors import UserError
from dpcap.evals import captions


@pytest.fixture(name='subject', scope='module')
def _subject():
  tokenizer = BytesTokenizer()
  model = models.make_model('captioner', size='micro', image_size=16, vocab_size=259)
  rng = np.random.default_rng()
  image = rng.normal(size=(16, 16, 3)).astype(np.float32)
  variables = jax.jit(model.init)(
    {'params': jax.random.key(0), 'frozen': jax.random.key(1)}, image, np.ones(6, np.int32)
  )
  return evals.Subject(
    model,
    variables,
    variables,
    data.Transform(16, 6, tokenizer),
    lambda section: data.Scenes(image_size=16, **section),
    note=lambda source: None,
    workers=0,
  )


def evaluate(subject, **options):
  return captions.evaluate(subject, batch_size=3, method='greedy', max_tokens=None, **options)


def test_evaluate_lists_what_was_written_beside_what_was_given(subject):
  section = dict(split='test', size=10)
  result = evaluate(subject, source=section, images=4)
  assert result.n == 4 and [c['index'] for c in result.details['captions']] == [0, 1, 2, 3]
  first = data.Scenes(image_size=16, **section)[0]['caption']
  assert result.details['captions'][0]['given'] == first[:4]  # 6 tokens with [CLS] and [SEP]
  assert 0 <= result.value <= 1
  loss, losses, count = jax.jit(subject.model.apply), 0.0, 0
  for index in range(4):
    example = subject.transform(data.Scenes(image_size=16, **section)[index], None)
    n = np.sum(example['tokens'][1:] != 0)
    losses += n * loss(subject.variables, data.normalize(example['image']), example['tokens'])
    count += n
  assert result.details['perplexity'] == pytest.approx(np.exp(losses / count), rel=1e-4)


def test_without_a_number_of_images_all_are_captioned(subject):
  result = evaluate(subject, source=dict(split='test', size=7), images=None)
  assert result.n == 7 and result.details['left_out'] == 0
  assert [c['index'] for c in result.details['captions']] == list(range(7))


def test_source_without_a_usable_image_is_refused(subject):
  class Empty:
    def __len__(self):
      return 0

  with pytest.raises(UserError, match='no usable image'):
    evaluate(subject._replace(make_source=lambda _: Empty()), source={}, images=4)


def test_each_of_several_usable_captions_is_right(subject, monkeypatch):
  class Pictures:
    """The second record has no caption, the third no image."""

    fingerprint = 'pictures'
    captions = [['ab', 'c'], [' ', None], 'x', ['', 'cd']]

    def __len__(self):
      return 4

    def __getitem__(self, index):
      image = b'' if index == 2 else np.full((16, 16, 3), index, np.uint8)
      return {'image': image, 'caption': self.captions[index], 'label': -1}

  text = subject.transform.tokenizer.encode('c', 6)
  write = lambda variables, images, numbers: np.tile(text, (len(images), 1))
  monkeypatch.setattr(captions.decoding, 'make_writer', lambda *args, **options: write)
  subject = subject._replace(make_source=lambda _: Pictures())
  result = evaluate(subject, source={}, images=None)
  assert result.details['captions'] == [
    {'index': 0, 'written': 'c', 'given': 'ab', 'others': ['c']},
    {'index': 3, 'written': 'c', 'given': 'cd'},
  ]
  assert result.value == 0.5 and result.details['left_out'] == 2
