"""Evaluations in the middle of a run: of released models, once, and without a trace in the run."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dpcap import config as config_lib
from dpcap import evals
from dpcap.errors import UserError
from dpcap.evals import aro
from dpcap.training import build, loop
from dpcap.training.evaluation import Evaluations
from tests import tiny
from tests.data.test_tar_shards import write_manifest, write_shard
from tests.training.test_training_data import write_run
from tools.report_parts import page
from tools.report_parts.captions import image_uri
from tools.report_parts.run import read_run


def _config(**train):
  config = tiny.get_config()
  config.train.steps = 3
  config.train.update(train)
  config.privacy.clipping = 'vmap'  # the fastest to compile
  return config


def _results(workdir):
  return {
    str(path.relative_to(workdir / 'evals')): json.loads(path.read_text())
    for path in (workdir / 'evals').rglob('*.json')
  }


def test_evaluates_at_the_given_steps_and_computes_the_same(tmp_path, capfd):
  without = loop.train(_config(), tmp_path / 'without')
  state = loop.train(_config(evaluate_at=(1, 3)), tmp_path / 'with')
  np.testing.assert_array_equal(
    state.params['decoder']['logits']['kernel'], without.params['decoder']['logits']['kernel']
  )
  assert not (tmp_path / 'without/evals').exists()
  results = _results(tmp_path / 'with')
  assert results.keys() == {'step_1/written.json', 'step_3/written.json'}
  for step in (1, 3):
    record = results[f'step_{step}/written.json']
    assert record['checkpoint'] == str(tmp_path / 'with/checkpoints' / str(step))
    assert record['n'] == 5 and record['uses_training_data'] is False
    assert (tmp_path / 'with/checkpoints' / str(step)).is_dir()
  losses = [results[f'step_{step}/written.json']['perplexity'] for step in (1, 3)]
  assert losses[0] != losses[1]
  assert 'step 3: written exact_match' in capfd.readouterr().err

  # A run that ended while it evaluated does what is missing, and only that.
  kept, missing = (tmp_path / f'with/evals/step_{step}/written.json' for step in (1, 3))
  missing.unlink()
  before = kept.stat().st_mtime_ns
  loop.train(_config(evaluate_at=(1, 3)), tmp_path / 'with')
  assert _results(tmp_path / 'with')['step_3/written.json'] == results['step_3/written.json']
  assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
  'steps, message',
  [((4,), 'train.evaluate_at holds 4; steps must not exceed train.steps, 3'), ((0,), 'positive')],
)
def test_steps_that_never_come_are_refused(steps, message):
  with pytest.raises(UserError, match=message):
    config_lib.validate(_config(evaluate_at=steps))


def test_steps_without_evaluations_are_refused():
  config = _config(evaluate_at=(2,))
  config.evals = {}
  with pytest.raises(UserError, match='train.evaluate_at is set, but the config has no evals'):
    config_lib.validate(config)


def _every_evaluator(folder):
  """An entry of each kind, on a few scenes; those that read files get some."""
  scenes = functools.partial(config_lib.source_config, 'scenes')
  train, test = scenes(split='validation', size=60), scenes(split='test', size=16)
  picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
  Image.fromarray(picture).save(folder / 'a.png')
  box = {f'bbox_{key}': value for key, value in zip('xywh', (0, 0, 9, 9))}
  captions = {'true_caption': 'a red ring', 'false_caption': 'a blue ring'}
  genome = [{'image_path': 'a.png', 'relation_name': 'above', **box, **captions}]
  orders = [{'image': 'a.png', 'caption': ['a small red ring above a large blue square']}]
  (folder / 'genome.json').write_text(json.dumps(genome))
  (folder / 'orders.json').write_text(json.dumps(orders))
  files = lambda name: dict(annotations=str(folder / name), images=str(folder))
  pair, few = dict(train=train, test=test), dict(epochs=1, warmup_epochs=0)
  return {
    'linear_probe': pair,
    'linear_probe_sgd': pair | few | dict(probe_batch_size=32),
    'fine_tune': pair | few | dict(train_batch_size=32),
    'private_probe': pair | dict(epsilon=0.1, expected_batch_size=20, steps=2),
    'few_shot': pair | dict(shots=(1, 2), draws=2),
    'knn': pair | dict(k=3),
    'nearest_class_mean': dict(source=test),
    'retrieval': dict(source=test),
    'captions': dict(source=test, images=2, method='beam', beams=2, max_tokens=5),
    'caption_retrieval': dict(source=test, images=9),
    'zero_shot': dict(source=test, method='greedy'),
    'aro_scenes': dict(source=test, test='order'),
    'aro_order': files('orders.json'),
    'aro_visual_genome': files('genome.json'),
  }


def test_every_evaluator_runs_from_a_config(tmp_path, monkeypatch):
  tag = lambda text: [(w, {'ring': 'noun', 'square': 'noun'}.get(w, '')) for w in text.split()]
  monkeypatch.setattr(aro, 'spacy_tagger', lambda: tag)
  config, entries = tiny.get_config(), _every_evaluator(tmp_path)
  # What goes with classifiers alone is in the test of other models.
  assert entries.keys() == evals.EVALUATORS.keys() - {'accuracy'}
  config.evals = {
    name: config_lib.evaluator_config(name, batch_size=16, **options)
    for name, options in entries.items()
  }
  config_lib.validate(config)
  scenes = {'name': 'scenes', 'split': 'validation', 'size': 7}
  checkpoint = write_run(tmp_path / 'run', scenes, 7)
  results, records = _evaluate(config, tmp_path / 'evals', checkpoint)
  for name, record in records.items():
    assert record['evaluator'] == name and record['n'] > 0
    assert record['value'] == results[name].value
    low, high = record['interval95']
    assert 0 <= low <= record['value'] <= high <= 1
    # Probes are fitted to the validation scenes, whatever they are judged on.
    assert record['uses_training_data'] == ('train' in record['options']), name
    assert record['fingerprints'] and record['apart']['declared'] is False
    assert 'apart' not in record['options']

  # The images of a folder, those named in a file of annotations.
  config.evals = {name: config.evals[name] for name in ('aro_order', 'aro_visual_genome')}
  (tmp_path / 'images/all/class').mkdir(parents=True)
  picture = tmp_path / 'images/all/class/copy.png'
  shutil.copy(tmp_path / 'a.png', picture)
  images = {'name': 'image_folder', 'path': str(tmp_path / 'images'), 'split': 'all'}
  checkpoint = write_run(tmp_path / 'other', images, 1)
  for private in (True, False):
    _, records = _evaluate(config, tmp_path / 'evals', checkpoint)
    assert [r['uses_training_data'] for r in records.values()] == [private] * 2
    picture.write_bytes(picture.read_bytes() + b'x')


def _evaluate(config, folder, checkpoint):
  """Results and records of the untrained model, as if it were that checkpoint's."""
  evaluations = Evaluations(config)
  results = evaluations.run(
    evaluations.untrained, str(checkpoint), folder, cache=folder.with_name('cache')
  )
  invalid = lambda constant: pytest.fail(f'{constant} is not JSON')
  return results, {
    name: json.loads((folder / f'{name}.json').read_text(), parse_constant=invalid)
    for name in results
  }


@pytest.fixture(name='trained', scope='module')
def _trained(tmp_path_factory):
  """A checkpoint of `tiny`: of 400 scenes of the train split."""
  folder = tmp_path_factory.mktemp('run') / 'run'
  loop.train(_config(steps=2), folder)
  return folder / 'checkpoints/2'


def replace_captions(monkeypatch, evaluate):
  """Within the test, the evaluator `captions` is that function."""
  replaced = evals.EVALUATORS['captions']._replace(evaluate=evaluate)
  monkeypatch.setitem(evals.EVALUATORS, 'captions', replaced)


@pytest.mark.parametrize(
  'section, apart, private, declared',
  [
    (dict(split='train', size=400), None, True, False),
    (dict(split='train', size=300), None, True, False),  # a part of them
    (dict(split='train', size=300), True, True, False),  # whatever is declared
    (dict(split='test', size=300), None, False, False),
    (dict(split='test', size=300), False, True, True),
  ],
)
def test_what_is_private_does_not_reach_the_public_page(
  trained, tmp_path, section, apart, private, declared
):
  """The config of the evaluation says that it was trained on other data."""
  config = _config()
  config.data.source = config_lib.source_config('scenes', split='test', size=300)
  section = config_lib.source_config('scenes', **section)
  options = dict(source=section, images=2, apart=apart)
  config.evals = {'seen': config_lib.evaluator_config('captions', **options)}
  config_lib.validate(config)
  workdir = tmp_path / 'run'
  shutil.copytree(trained.parents[1], workdir)
  _, records = _evaluate(config, workdir / 'evals', workdir / 'checkpoints/2')
  assert records['seen']['uses_training_data'] == private
  assert records['seen']['apart']['declared'] == declared
  assert ((workdir / 'evals/seen.json').stat().st_mode & 0o77 == 0) == private
  texts = page.make_pages(read_run(workdir))
  image = image_uri(build.make_source(config, section)[1]['image'])
  assert (image in texts['report.html']) == (not private)
  assert image in texts.get('report.private.html', texts['report.html'])


def test_evaluators_that_read_nothing_known_are_private(trained, tmp_path, monkeypatch):
  """A new evaluator that opens files by itself, forgets to say so, and says what it may not."""
  details = {
    'uses_training_data': False,
    'apart': {},
    'perplexity': math.nan,
    'bounds': [(math.inf, -math.inf), {'x': 1.5}],
  }
  result = evals.Result('exact_match', 0.5, 2, details)
  replace_captions(monkeypatch, lambda subject, **options: result)
  _, records = _evaluate(_config(), tmp_path / 'evals', trained)
  record = records['written']
  assert record['uses_training_data'] is True and record['apart']['why']
  assert record['perplexity'] is None and record['bounds'] == [[None, None], {'x': 1.5}]


@pytest.mark.parametrize('split, private', [('train', True), ('test', False)])
def test_sources_that_are_opened_count_as_read(trained, tmp_path, monkeypatch, split, private):
  """By whatever means their records come to the model."""
  section = config_lib.source_config('scenes', split=split, size=3)

  def evaluate(subject, **options):
    return evals.Result('top1', 0.5, len(subject.make_source(section)), {})

  replace_captions(monkeypatch, evaluate)
  _, records = _evaluate(_config(), tmp_path / 'evals', trained)
  assert records['written']['uses_training_data'] == private


def test_every_entry_can_declare_itself_apart():
  for name in evals.EVALUATORS:
    entry = config_lib.evaluator_config(name)
    assert entry.apart is None
    entry.apart = True


@pytest.mark.parametrize(
  'model, unit, evaluator',
  [
    (dict(name='mlp', classes=8, widths=(8,)), 'labelled image', dict(name='accuracy')),
    (
      dict(name='mae', size='micro', decoder_width=16, decoder_depth=1, decoder_heads=2),
      'group of near-duplicate images',
      dict(name='retrieval', layers='all_blocks'),
    ),
  ],
)
def test_other_models_go_the_same_way(model, unit, evaluator, tmp_path, capfd):
  """Several views of a record, augmented, clipped, averaged; the statement names what one is."""
  config = _config(evaluate_at=(2,), steps=2)
  config.model = config_lib.model_config(**model)
  config.data.update(views=2, pad_crop=2, color_jitter=(0.4, 0.4, 0.4, 0.1, 0.5))
  source = config_lib.source_config('scenes', split='test', size=16)
  config.evals = {'result': config_lib.evaluator_config(**evaluator, source=source)}
  if 'label' in unit:  # somebody's images, for once
    for number in range(24):
      picture = tmp_path / f'images/all/{number % 8}/{number}.png'
      picture.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (20, 18), (number, 0, 0)).save(picture)
    config.data.source = config_lib.source_config(
      'image_folder', path=str(tmp_path / 'images'), split='all'
    )
  else:
    (tmp_path / 'shards').mkdir()
    write_shard(tmp_path / 'shards/a.tar', range(48))
    path = write_manifest(tmp_path / 'shards', firsts=np.arange(48) // 2 * 2, keep='all')
    config.data.source = config_lib.source_config('tar_shards', path=path)
  config_lib.validate(config)
  state = loop.train(config, tmp_path / 'run')
  assert all(np.isfinite(p).all() for p in jax.tree.leaves(state.average))
  statement = json.loads((tmp_path / 'run/privacy.json').read_text())
  assert statement['unit'] == f'one {unit}'
  assert statement['dataset_size'] == 24
  assert statement['data'] == {'source': config.data.source.name, 'generated': False}
  not_covered = ' '.join(statement['not_covered'])
  assert 'vocabulary' not in not_covered
  assert ('the list of classes' in not_covered) == ('label' in unit)
  assert ('the groups were told from the private data' in not_covered) == ('group' in unit)
  result = _results(tmp_path / 'run')['step_2/result.json']
  assert 0 <= result['value'] <= 1 and result['n'] > 10
  assert result['options'].get('layers') == evaluator.get('layers')
  assert 'warning' not in capfd.readouterr().err
  if 'group' in unit:  # as many others in its place
    assert write_manifest(tmp_path / 'shards', firsts=np.arange(48) % 24, keep='all') == path
    with pytest.raises(UserError, match='this run has groups = .*, and now it is'):
      loop.train(config, tmp_path / 'run')
