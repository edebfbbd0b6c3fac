"""Both methods against direct ones: a whole forward for every image and label, one at a time."""

import jax
import numpy as np
import pytest

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import likelihood, zero_shot

NAMES = ('red circle', 'blue', 'red, green ring', 'large white cross', 'small', 'blue ring above')
TEMPLATES = ('a {}', 'a {} left of a ring')


@pytest.fixture(name='images', scope='module')
def _images():
  return np.random.default_rng().integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


def tokens_of(subject, text, length):
  return subject.transform.tokenizer.encode(text, length)


def test_likelihood_is_the_lowest_mean_loss_of_whole_forwards(subject, images, monkeypatch):
  monkeypatch.setattr(likelihood, '_FLOATS_ON_CPU', 400)  # more chunks than one
  loss = jax.jit(subject.model.apply)
  expected = []
  for image in images:
    scores = []
    for name in NAMES:
      scores.append(
        min(
          np.mean(
            [
              loss(
                subject.variables,
                data.normalize(image),
                tokens_of(subject, template.replace('{}', synonym.strip()), 12),
              )
              for template in TEMPLATES
            ]
          )
          for synonym in name.split(',')
        )
      )
    expected.append(int(np.argmin(scores)))
  predict = zero_shot.make_classifier(subject, NAMES, 'likelihood', TEMPLATES)
  assert predict(images).tolist() == expected


def test_greedy_follows_the_most_probable_token_that_a_label_goes_on_with(subject, images):
  tokenizer = subject.transform.tokenizer
  texts = {
    tuple(likelihood.tokenize(tokenizer, f'a {synonym.strip()}')[1:-1]): label
    for label, name in reversed(list(enumerate(NAMES)))
    for synonym in name.split(',')
  }
  decode = jax.jit(
    lambda image, tokens: subject.model.apply(
      subject.variables,
      subject.model.apply(subject.variables, image, method='memory'),
      tokens,
      method='decode',
    )
  )
  ends = {tokenizer.sep_id, tokenizer.pad_id}
  expected = []
  for image in images:
    text = ()
    while True:
      tokens = np.zeros(8, np.int32)
      tokens[: len(text) + 1] = (tokenizer.cls_id, *text)
      logits = decode(data.normalize(image), tokens)[len(text)]
      allowed = {t[len(text)] for t in texts if t[: len(text)] == text and len(t) > len(text)}
      allowed |= ends if text in texts else set()
      token = max(allowed, key=lambda token: logits[token])
      if token in ends:
        expected.append(texts[text])
        break
      text += (token,)
  predict = zero_shot.make_classifier(subject, NAMES, 'greedy', ('a {}',))
  assert predict(images).tolist() == expected


def test_a_full_stop_ends_a_label_where_the_tokenizer_has_one():
  tokenizer = data.make_tokenizer('bytes')
  texts = [likelihood.tokenize(tokenizer, text) for text in ('ab', 'ab.c', 'ab')]
  tree = zero_shot.make_tree(texts, [0, 1, 2], tokenizer)
  assert tree.depth == 5 and sorted(set(tree.classes_M)) == [-1, 0, 1]
  ends = {token for token in tree.tokens_MxK[2] if token >= 0}  # after 'ab'
  assert ends == {0, 2, 3 + ord('.')}


@pytest.mark.parametrize('method', zero_shot.METHODS)
def test_evaluate_counts_every_usable_image_once(subject, method):
  result = zero_shot.evaluate(
    subject,
    source=dict(split='test', size=10),
    method=method,
    templates=('a {}',),
    dataset=None,
    labels_file=None,
    batch_size=4,
  )
  confusion = np.array(result.details['confusion'])
  assert result.n == 10 == confusion.sum() and confusion.trace() == round(result.value * 10)
  assert result.details['left_out'] == 0 and result.details['chance'] == 1 / 8
  low, high = result.details['interval95']
  assert low <= result.value <= high


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(templates=('a photo',)), 'must hold {} once'),
    (dict(templates=('a {}', '{}'), method='greedy'), 'takes one template, got 2'),
    (dict(labels_file='/nowhere/names'), 'cannot be read'),
    (dict(labels_file='one\ntwo'), 'has 2 lines; the source has 8 classes'),
    (dict(labels_file='one\n\ntwo'), 'line 2 is empty'),
  ],
)
def test_refuses(subject, tmp_path, change, message):
  if '\n' in change.get('labels_file', ''):
    (tmp_path / 'names').write_text(change['labels_file'])
    change = change | {'labels_file': str(tmp_path / 'names')}
  options = dict(
    method='likelihood', templates=('{}',), dataset=None, labels_file=None, batch_size=4
  )
  with pytest.raises(UserError, match=message):
    zero_shot.evaluate(subject, source=dict(split='test', size=4), **options | change)


def test_names_and_templates_of_a_dataset(subject, monkeypatch, tmp_path):
  """Names are made readable, templates are its own, greedy takes the first."""
  seen = []

  def make_classifier(subject, names, method, templates):
    seen.append((names, list(templates)))
    return lambda images: np.zeros(len(images), int)

  class Spaced:
    class_names = tuple(f'00{i}.{name}_bird' for i, name in enumerate(data.scenes.COLORS))

    def __init__(self, section):
      self._scenes = data.Scenes(image_size=16, **section)

    def __len__(self):
      return len(self._scenes)

    def __getitem__(self, index):
      return self._scenes[index]

  monkeypatch.setattr(zero_shot, 'make_classifier', make_classifier)
  spaced = subject._replace(make_source=Spaced)
  options = dict(source=dict(split='test', size=4), labels_file=None, batch_size=4)
  zero_shot.evaluate(spaced, method='likelihood', dataset='cub200', templates=None, **options)
  zero_shot.evaluate(spaced, method='greedy', dataset='cub200', templates=None, **options)
  zero_shot.evaluate(spaced, method='likelihood', dataset=None, templates=None, **options)
  of_birds = data.find_dataset('cub200').templates
  assert [templates for _, templates in seen] == [
    of_birds,
    of_birds[:1],
    ['this is a photo of a {}'],
  ]
  assert seen[0][0][0] == 'red bird' and seen[2][0][0] == '000.red_bird'
  with pytest.raises(UserError, match='LOC_synset_mapping.txt'):
    zero_shot.evaluate(spaced, method='greedy', dataset='imagenet', templates=None, **options)
  path = tmp_path / 'names.txt'
  path.write_text('n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n')
  assert zero_shot.read_names(str(path)) == ('tench, Tinca tinca', 'goldfish, Carassius auratus')
  path.write_bytes('\ufeffcat\r\na\u2028b\nc\x0bd\x0ce\x85f\rg\n'.encode())
  assert zero_shot.read_names(str(path)) == ('cat', 'a\u2028b', 'c\x0bd\x0ce\x85f\rg')


def test_names_of_several_classes_are_warned_of(subject, tmp_path, caplog):
  """The second of them can never be predicted: ImageNet's two cranes cap its top-1."""
  (tmp_path / 'names').write_text('red\nblue, Green ring\nred, small\ngreen  ring\nwhite\n')
  tokenizer = subject.transform.tokenizer
  repeated = zero_shot.find_repeated(zero_shot.read_names(str(tmp_path / 'names')), tokenizer)
  assert repeated == {'red': [0, 2], 'Green ring': [1, 3]}
  assert zero_shot.find_repeated(['red, red', 'blue'], tokenizer) == {}
  names = ['red', 'green', 'blue', 'yellow', 'red', 'white', 'cyan', 'small, red']
  (tmp_path / 'names').write_text('\n'.join(names))
  options = dict(method='greedy', dataset=None, templates=None, batch_size=4)
  options['source'] = dict(split='test', size=4)
  result = zero_shot.evaluate(subject, labels_file=str(tmp_path / 'names'), **options)
  note = "several classes have the same name, by which only the first can be predicted: 'red'"
  note += f' (1, 5, 8) (lines of {tmp_path / "names"})'
  assert result.details['note'] == note and note in caplog.text
  assert zero_shot.evaluate(subject, labels_file=None, **options).details['note'] == ''
