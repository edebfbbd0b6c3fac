"""Evaluations in the middle of a run: of released models, once, and without a trace in the run."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from dpcap import config as config_lib
from dpcap import evals
from dpcap.errors import UserError
from dpcap.evals import aro
from dpcap.training import loop
from dpcap.training.evaluation import Evaluations
from tests import tiny


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
    'retrieval': dict(source=test),
    'captions': dict(source=test, images=2, method='beam', beams=2, max_tokens=5),
    'zero_shot': dict(source=test, method='greedy'),
    'aro_scenes': dict(source=test, test='order'),
    'aro_order': files('orders.json'),
    'aro_visual_genome': files('genome.json'),
  }


def test_every_evaluator_runs_from_a_config(tmp_path, monkeypatch):
  tag = lambda text: [(w, {'ring': 'noun', 'square': 'noun'}.get(w, '')) for w in text.split()]
  monkeypatch.setattr(aro, 'spacy_tagger', lambda: tag)
  config, entries = tiny.get_config(), _every_evaluator(tmp_path)
  assert entries.keys() == evals.EVALUATORS.keys()
  config.evals = {
    name: config_lib.evaluator_config(name, batch_size=16, **options)
    for name, options in entries.items()
  }
  config_lib.validate(config)
  evaluations = Evaluations(config)
  folder = tmp_path / 'evals'
  results = evaluations.run(evaluations.untrained, 'nowhere', folder, cache=folder / 'cache')
  for name, result in results.items():
    record = json.loads((folder / f'{name}.json').read_text())
    assert record['evaluator'] == name and record['value'] == result.value and record['n'] > 0
    low, high = record['interval95']
    assert 0 <= low <= record['value'] <= high <= 1
