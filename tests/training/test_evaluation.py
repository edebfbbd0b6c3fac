"""Evaluations in the middle of a run: of released models, once, and without a trace in the run."""

import json

import numpy as np
import pytest

from dpcap import config as config_lib
from dpcap.errors import UserError
from dpcap.training import loop
from tests import tiny


def _config(**train):
  config = tiny.get_config()
  config.train.steps = 3
  config.train.update(train)
  config.privacy.clipping = 'vmap'  # the fastest to compile
  test = config_lib.source_config('scenes', split='test', size=6)
  config.evals.written = config_lib.evaluator_config(
    'captions', source=test, images=4, batch_size=4
  )
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
    assert record['n'] == 4 and record['uses_training_data'] is False
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
