"""Features on disk: used again, gone on with, never taken for those of something else."""

import stat

import numpy as np
import pytest

from dpcap import config as config_lib
from dpcap import data, evals
from dpcap.errors import UserError
from dpcap.evals import batches, features
from dpcap.models import MAE, Captioner

SECTION = dict(split='test', size=23)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
  monkeypatch.setattr(features, '_BATCHES_PER_FILE', 2)


@pytest.fixture(name='computed')
def _computed(monkeypatch):
  """How many batches were computed by the extractions of a test."""
  seen = []
  each = batches.each

  def counting(subject, title, all_batches, compute, start=0):
    for answer in each(subject, title, all_batches, compute, start):
      seen.append(answer)
      yield answer

  monkeypatch.setattr(batches, 'each', counting)
  return seen


PIXELS = features.Choice('pixels', None)


def extract(subject, folder, kind='pixels', layers=None, batch_size=4, **section):
  source = subject.make_source(SECTION | section)
  choice = features.choose('knn', subject.model, kind, layers)
  return features.extract(subject._replace(cache=folder), source, choice, batch_size)


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def test_features_are_those_of_the_images_in_order(subject, tmp_path):
  found = extract(subject, tmp_path)
  source = data.Scenes(image_size=16, **SECTION)
  expected = [data.normalize(source[i]['image']).ravel() for i in range(23)]
  np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-5)
  assert found.labels.tolist() == [source[i]['label'] for i in range(23)]
  assert found.numbers.tolist() == list(range(23))


def test_features_of_no_model_are_shared_by_all_models(subject, tmp_path, computed):
  other = subject._replace(variables=subject.untrained)
  for kind in ('hog', 'pixels'):
    first = extract(subject, tmp_path, kind)
    before = len(computed)
    assert_same(extract(other, tmp_path, kind), first)
    assert len(computed) == before
    assert np.isfinite(first.features).all() and first.features.std() > 0


def test_a_second_extraction_reads_what_the_first_wrote(subject, tmp_path, computed):
  tmp_path.chmod(0o755)  # as another program may have made it
  first = extract(subject, tmp_path)
  assert len(computed) == 6
  assert_same(extract(subject, tmp_path), first)
  assert len(computed) == 6
  folders = [tmp_path, *(path for path in tmp_path.rglob('*') if path.is_dir())]
  assert len(folders) == 2
  assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in folders)
  files = [path for path in tmp_path.rglob('*') if path.suffix == '.npz']
  assert len(files) == 3
  assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


@pytest.mark.parametrize('damage', ['missing', 'cut', 'flipped'])
def test_goes_on_where_files_end(subject, tmp_path, computed, damage):
  first = extract(subject, tmp_path)
  second, third = sorted(tmp_path.rglob('*.npz'))[1:]
  if damage == 'missing':
    second.unlink()
    third.unlink()
  else:
    content = bytearray(second.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    second.write_bytes(content[:middle] if damage == 'cut' else content)
  del computed[:]
  assert_same(extract(subject, tmp_path), first)
  assert len(computed) == 4


def test_other_data_labels_kinds_and_sizes_are_computed_anew(subject, tmp_path, computed):
  extract(subject, tmp_path)
  for change in (
    dict(label='shape'),
    dict(split='validation'),
    dict(size=22),
    dict(kind='model'),
    dict(kind='model', layers='encoder'),
    dict(kind='model', layers='projection'),
    dict(kind='untrained'),
    dict(batch_size=5),
  ):
    before = len(computed)
    extract(subject, tmp_path, **change)
    # The untrained model of these tests is the model.
    assert len(computed) > before, change


def test_other_names_of_the_labels_are_computed_anew(subject, tmp_path, computed):
  """Records may be the same where labels are not: tar shards, read by another key."""

  class Renamed(data.Scenes):
    fingerprint = 'the same'

  for label in ('color', 'shape'):
    source = Renamed(image_size=16, **SECTION, label=label)
    found = features.extract(subject._replace(cache=tmp_path), source, PIXELS, 4)
    assert found.labels.tolist() == [source[i]['label'] for i in range(23)]
  assert len(computed) == 12


def test_other_parameters_are_computed_anew(subject, tmp_path):
  first = extract(subject, tmp_path, kind='model')
  projection = subject.variables['params']['memory_projection']
  changed = projection | {'bias': projection['bias'].at[0].add(1.0)}
  params = subject.variables['params'] | {'memory_projection': changed}
  other = subject._replace(variables=subject.variables | {'params': params})
  second = extract(other, tmp_path, kind='model')
  np.testing.assert_allclose(second.features[:, 0], first.features[:, 0] + 1, rtol=1e-4)


def test_without_a_folder_nothing_is_written(subject, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  extract(subject, None)
  assert not list(tmp_path.iterdir())


def pair(subject, train, test):
  return features.extract_pair(subject, 'knn', train, test, PIXELS, 8)


def test_one_split_for_both_is_refused(subject):
  with pytest.raises(UserError, match='knn: train and test are the same source; give two splits'):
    pair(subject, SECTION, dict(SECTION))


def test_classes_without_a_training_image_are_refused(subject):
  with pytest.raises(
    UserError, match='knn: the train source has no usable image of .* right split'
  ):
    pair(subject, dict(split='train', size=2), SECTION)


# --- Which features.


def test_layers_left_out_are_the_models_first(subject):
  choose = lambda *options: features.choose('knn', subject.model, *options)
  assert choose('model', None) == choose('model', 'memory') == ('model', 'memory')
  assert choose('untrained', 'all_blocks') == ('untrained', 'all_blocks')
  assert choose('pixels', None) == ('pixels', None)


@pytest.mark.parametrize(
  'model, options, message',
  [
    (MAE, ('model', 'memory'), "knn: layers is 'memory'; those of the MAE are encoder, all_blocks"),
    (Captioner, ('untrained', 'all'), "layers is 'all'; those of the Captioner are memory,"),
    (MAE, ('pixels', 'encoder'), "knn: layers is 'encoder'; features=pixels has none"),
  ],
)
def test_layers_that_the_model_has_not_are_refused(model, options, message):
  with pytest.raises(UserError, match=message):
    features.choose('knn', model, *options)


def test_extracted_are_the_layers_asked_for(subject):
  source = subject.make_source(SECTION)
  images = np.stack([data.normalize(source[i]['image']) for i in range(4)])
  for layers, dimension in (('memory', 16), ('all_blocks', 16)):
    found = extract(subject, None, 'model', layers, batch_size=4, size=4)
    expected = subject.model.apply(subject.variables, images, layers=layers, method='features')
    assert found.features.shape == (4, dimension)
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'name', ['linear_probe', 'linear_probe_sgd', 'few_shot', 'knn', 'retrieval', 'private_probe']
)
def test_every_evaluator_extracts_the_layers_of_its_entry(subject, monkeypatch, name):
  """With the keys of its config; and refuses layers that are not there before it reads anything."""

  class Extracted(Exception):
    pass

  def extract(subject, source, choice, batch_size):
    raise Extracted(tuple(choice))

  monkeypatch.setattr(features, 'extract', extract)
  options = config_lib.evaluator_config(name).to_dict() | dict(layers='encoder')
  for key in ('name', 'apart'):
    del options[key]
  sections = iter((SECTION, dict(split='validation', size=23)))
  options |= {key: next(sections) for key in ('train', 'test', 'source') if key in options}
  with pytest.raises(Extracted) as raised:
    evals.EVALUATORS[name].evaluate(subject, **options)
  assert raised.value.args == (('model', 'encoder'),)
  with pytest.raises(UserError, match=f"{name}: layers is 'none'; those of the Captioner are"):
    evals.EVALUATORS[name].evaluate(subject, **options | dict(layers='none'))
