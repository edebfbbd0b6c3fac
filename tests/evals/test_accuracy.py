"""The accuracy of a classifier against counting one image at a time."""

import jax
import numpy as np
import pytest

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.evals import accuracy
from dpcap.models.mlp import MLP


def classifier(subject, classes):
  keys = {name: key.default for name, key in MLP.KEYS.items()} | dict(classes=classes, widths=(8,))
  model = MLP.make(image_size=16, vocab_size=1, remat=False, **keys)
  image = np.zeros((16, 16, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), image, 0)
  return subject._replace(model=model, variables=variables, untrained=variables)


def logits_of(subject, image):
  p = subject.variables['params']
  x = np.asarray(data.normalize(image)).ravel()
  hidden = np.tanh(x @ p['encoder']['layer_0']['kernel'] + p['encoder']['layer_0']['bias'])
  return hidden @ p['head']['kernel'] + p['head']['bias']


class SomeBroken:
  """Scenes, of which one in seven cannot be read."""

  def __init__(self, scenes):
    self.scenes = scenes

  def __getattr__(self, name):
    return getattr(self.scenes, name)

  def __len__(self):
    return len(self.scenes)

  def __getitem__(self, index):
    if index % 7 == 3:
      raise BadRecord('broken')
    return self.scenes[index]


@pytest.mark.parametrize('label, classes', [('color', 8), ('count', 4)])
def test_top1_and_top5_against_a_loop(subject, label, classes):
  scenes = SomeBroken(data.Scenes(image_size=16, split='test', size=50, label=label))
  subject = classifier(subject, classes)._replace(make_source=lambda section: scenes)
  result = accuracy.evaluate(subject, source={}, batch_size=16)
  places = []
  for i in range(50):
    if i % 7 != 3:
      logits = logits_of(subject, scenes[i]['image'])
      places.append(int(np.sum(logits > logits[scenes[i]['label']])))
  assert (result.metric, result.n, result.details['left_out']) == ('top1', len(places), 7)
  assert result.value == pytest.approx(np.mean(np.array(places) == 0))
  assert result.details['interval95'][0] < result.value < result.details['interval95'][1]
  assert result.details['chance'] == 1 / classes
  if classes > 5:
    expected = np.mean(np.array(places) < 5)
    assert 0 < result.value < expected < 1, 'a random model shows the difference'
    assert result.details['top5'] == pytest.approx(expected)
    low, high = result.details['top5_interval95']
    assert low < expected < high
  else:
    assert 'top5' not in result.details


def test_what_does_not_fit_is_refused_in_one_line(subject):
  source = dict(split='test', size=20)
  with pytest.raises(UserError, match=r'the source has 8 classes, the model 3 \(model.classes\)'):
    accuracy.evaluate(classifier(subject, 3), source=source, batch_size=8)
