"""Runs that are stopped, killed, broken or resumed elsewhere, and what they leave behind."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.privacy import clipping
from dpcap.training import build, loop
from dpcap.training import step as step_lib
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.optimizer import make_optimizer
from tests import tiny

_LONG = 10  # steps of the runs that get killed


def _config(**changes):
  config = tiny.get_config()
  for path, value in changes.items():
    section, key = path.split('__')
    config[section][key] = value
  return config


def _final(config, workdir, step=None):
  """The state in the newest checkpoint of a run."""
  model = build.make_model(config, build.make_tokenizer(config).vocab_size)
  optimizer = make_optimizer(config.optimizer, config.train.steps)
  layout = Layout(make_mesh())
  like = step_lib.init_state(
    model, optimizer, layout, config.data.image_size, config.data.text_length, 0
  )
  checkpoints = Checkpoints(workdir / 'checkpoints')
  step = step or checkpoints.latest_step()
  state = checkpoints.restore(step, like)
  checkpoints.close()
  assert int(state.step) == step
  return jax.device_get(state)


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wait_for_step(process, workdir, step):
  """Waits until a run has done `step` steps."""
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    path = workdir / 'diagnostics.private.jsonl'
    if path.exists() and path.read_text().count('\n') >= step:
      return
    if process.poll() is not None:
      raise AssertionError(f'ended early: {process.communicate()}')
    time.sleep(0.002)
  raise AssertionError('took too long')


def _children(pid):
  """Data workers of a run."""
  found = []
  for stat_file in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      parent = int(stat_file.read_text().rpartition(')')[2].split()[1])
      command = stat_file.with_name('cmdline').read_text()
    except (FileNotFoundError, ProcessLookupError):
      continue
    if parent == pid and 'spawn_main' in command:
      found.append(int(stat_file.parent.name))
  assert found
  return found


@pytest.fixture(scope='module', name='reference')
def _reference(tmp_path_factory):
  """The final state of an uninterrupted run, and its workdir."""
  workdir = tmp_path_factory.mktemp('reference') / 'run'
  config = _config(train__steps=_LONG)
  loop.train(config, workdir)
  return _final(config, workdir), workdir


def _start(program, workdir, *arguments):
  return program(
    'dpcap.train',
    '--config=tests/tiny.py',
    f'--workdir={workdir}',
    f'--config.train.steps={_LONG}',
    *arguments,
  )


def test_sigkill_at_any_moment_resumes_to_the_same_bits(program, tmp_path, reference):
  """Killed twice, with worker processes; then finished in the background without them."""
  workdir = tmp_path / 'run'
  for step in (3, 6):
    process = _start(program, workdir, '--config.data.workers=1')
    _wait_for_step(process, workdir, step)
    time.sleep(np.random.default_rng().uniform(0, 0.05))
    process.kill()
    process.communicate()
  process = _start(program, workdir)
  output = process.communicate()[1]
  assert process.returncode == 0, output
  config = _config(train__steps=_LONG)
  jax.tree.map(np.testing.assert_array_equal, _final(config, workdir), reference[0])
  # Replay is exact: nothing was released beyond the run's own steps.
  assert json.loads((workdir / 'privacy.json').read_text())['releases'] == _LONG
  assert _lines(workdir / 'diagnostics.private.jsonl') == _lines(
    reference[1] / 'diagnostics.private.jsonl'
  )


def test_sigterm_saves_first_and_resumes_to_the_same_bits(program, tmp_path, reference):
  workdir = tmp_path / 'run'
  # No periodic checkpoint: what is there after the signal was saved because of it.
  process = _start(
    program, workdir, '--config.train.checkpoint_every=1000', '--config.data.workers=1'
  )
  _wait_for_step(process, workdir, 3)
  # As a scheduler does it: to the worker processes too.
  for pid in [process.pid, *_children(process.pid)]:
    os.kill(pid, signal.SIGTERM)
  output = process.communicate()[1]
  assert process.returncode == loop.STOPPED, output
  assert re.search(r'stopped after \d+ steps, saved', output)
  saved = [int(p.name) for p in (workdir / 'checkpoints').iterdir()]
  assert len(saved) == 1 and 3 <= saved[0] < _LONG
  config = _config(train__steps=_LONG)
  loop.train(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, _final(config, workdir), reference[0])


def test_dead_worker_is_told_in_one_line(program, tmp_path):
  workdir = tmp_path / 'run'
  process = _start(program, workdir, '--config.data.workers=1', '--config.train.steps=400')
  _wait_for_step(process, workdir, 3)
  for pid in _children(process.pid):
    os.kill(pid, signal.SIGKILL)
  errors = process.communicate()[1]
  assert process.returncode == 2
  assert 'error: a data worker died' in errors and 'Traceback' not in errors


def test_workdir_holds_what_the_contract_says(reference):
  workdir = reference[1]
  assert {p.name for p in workdir.iterdir()} == {
    'config.json',
    'privacy.json',
    'checkpoints',
    'metrics.jsonl',
    'tensorboard',
    'diagnostics.private.jsonl',
  }
  statement = json.loads((workdir / 'privacy.json').read_text())
  assert statement['steps'] == statement['releases'] == _LONG
  latest = workdir / f'checkpoints/{_LONG}/privacy/metadata'
  assert json.loads(latest.read_text()) == statement
  # Earlier checkpoints carry what had been spent by then.
  earlier = json.loads((workdir / f'checkpoints/{_LONG - 2}/privacy/metadata').read_text())
  assert earlier['releases'] == _LONG - 2
  assert earlier['epsilon']['pld'] < statement['epsilon']['pld']


def test_public_metrics_hold_nothing_private(reference):
  lines = _lines(reference[1] / 'metrics.jsonl')
  assert [line['step'] for line in lines] == list(range(1, _LONG + 1))
  for line in lines:
    assert set(line) == {'step', 'epsilon', 'learning_rate', 'images_per_second'}
  epsilons = [line['epsilon'] for line in lines]
  assert epsilons == sorted(epsilons)


def test_diagnostics_can_be_switched_off(tmp_path):
  loop.train(_config(train__diagnostics=False), tmp_path / 'run')
  assert not [p for p in (tmp_path / 'run').rglob('*') if 'private' in p.name]


def test_keys_are_entropy_owner_readable_and_nowhere_else(tmp_path, capfd):
  workdir = tmp_path / 'run'
  loop.train(_config(privacy__seed=None), workdir)
  store = loop.secrets_directory(workdir)
  keys = json.loads((store / 'keys.json').read_text())
  assert stat.S_IMODE(store.stat().st_mode) == 0o700
  assert stat.S_IMODE((store / 'keys.json').stat().st_mode) == 0o600
  statement = json.loads((workdir / 'privacy.json').read_text())
  assert statement['private'] and 'entropy' in statement['key_policy']
  screen = ''.join(capfd.readouterr()).encode()
  for width, words in ((4, keys['noise']), (8, keys['sampling'])):
    for word in words:
      for form in (str(word).encode(), word.to_bytes(width, 'little'), word.to_bytes(width, 'big')):
        assert form not in screen
        for path in workdir.rglob('*'):
          assert not path.is_file() or form not in path.read_bytes(), path


def test_two_runs_draw_different_keys(tmp_path):
  params = []
  for name in ('a', 'b'):
    state = loop.train(_config(privacy__seed=None, train__steps=2), tmp_path / name)
    params.append(jax.tree.leaves(jax.device_get(state.params))[0])
  assert not np.array_equal(*params)


class _Crash(Exception):
  pass


def _crash_after(monkeypatch, steps):
  """Makes the run die once `steps` steps are done, before anything is saved."""
  save = loop._Run.save

  def dying(run):
    if run.done == steps:
      raise _Crash
    save(run)

  monkeypatch.setattr(loop._Run, 'save', dying)


def test_inexact_replay_gets_fresh_noise_and_counts_again(tmp_path, monkeypatch, capfd):
  """Steps 3 and 4 were computed, not saved, and can't be repeated bit for bit elsewhere."""
  workdir = tmp_path / 'run'
  with monkeypatch.context() as patch, pytest.raises(_Crash):
    _crash_after(patch, 4)
    loop.train(_config(privacy__seed=None), workdir)
  path = loop.secrets_directory(workdir) / 'keys.json'
  before = json.loads(path.read_text())
  loop.train(_config(privacy__seed=None, mesh__physical_batch=4), workdir)
  after = json.loads(path.read_text())
  assert before['noise'] != after['noise'] and before['sampling'] != after['sampling']
  statement = json.loads((workdir / 'privacy.json').read_text())
  assert (statement['steps'], statement['releases']) == (tiny.STEPS, tiny.STEPS + 2)
  plan = build.make_plan(_config(), 400)
  assert statement['epsilon']['pld'] == pytest.approx(plan.epsilon(tiny.STEPS + 2))
  assert 'fresh keys' in capfd.readouterr().err


def test_crash_before_the_first_checkpoint_replays_from_the_start(tmp_path, monkeypatch):
  workdir, config = tmp_path / 'run', _config(privacy__seed=None)
  with monkeypatch.context() as patch, pytest.raises(_Crash):
    _crash_after(patch, 2)
    loop.train(config, workdir)
  keys = (loop.secrets_directory(workdir) / 'keys.json').read_text()
  loop.train(config, workdir)
  after = json.loads((loop.secrets_directory(workdir) / 'keys.json').read_text())
  assert json.loads(keys)['noise'] == after['noise']
  assert json.loads((workdir / 'privacy.json').read_text())['releases'] == tiny.STEPS


@pytest.mark.parametrize('where', ['begin', 'update', 'report', 'checkpoint'])
def test_crash_anywhere_in_a_step_resumes_to_the_same_bits(tmp_path, monkeypatch, reference, where):
  """Before the ledger, between ledger and release, after the release, and while saving."""
  workdir, config = tmp_path / 'run', _config(train__steps=_LONG)

  def crash(*_, **__):
    raise _Crash

  with monkeypatch.context() as patch, pytest.raises(_Crash):
    real = loop._Run.one_step

    def one_step(run, stop):
      if run.done == 5:
        if where == 'begin':
          run._store.begin = crash
        elif where == 'update':
          run._step = dataclasses.replace(run._step, update=crash)
        elif where == 'report':
          run._report = crash
        else:
          run._checkpoints.save = crash
      return real(run, stop)

    patch.setattr(loop._Run, 'one_step', one_step)
    loop.train(config, workdir)
  loop.train(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, _final(config, workdir), reference[0])
  assert json.loads((workdir / 'privacy.json').read_text())['releases'] == _LONG


def test_other_data_or_plan_is_never_replayed_under_the_same_noise(tmp_path, monkeypatch):
  """N is the source's own: it grew between the crash and the restart."""
  workdir = tmp_path / 'run'
  config = _config(privacy__seed=None)
  with monkeypatch.context() as patch, pytest.raises(_Crash):
    _crash_after(patch, 4)
    loop.train(config, workdir)
  with monkeypatch.context() as patch:
    make = build.make_training_source
    larger = lambda config: dataclasses.replace(make(config), size=401)
    patch.setattr(build, 'make_training_source', larger)
    _refused(config, workdir, 'dataset_size = 400', '401')
  # Same N, other records: their gradients differ, so they get other noise and count anew.
  make = build.make_training_source
  other = lambda config: dataclasses.replace(make(config), split='validation')
  monkeypatch.setattr(build, 'make_training_source', other)
  loop.train(config, workdir)
  assert json.loads((workdir / 'privacy.json').read_text())['releases'] == tiny.STEPS + 2


def test_keys_lost_before_the_first_checkpoint_are_missed(tmp_path, monkeypatch):
  workdir, config = tmp_path / 'run', _config(train__checkpoint_every=5)
  with monkeypatch.context() as patch, pytest.raises(_Crash):
    _crash_after(patch, 5)
    loop.train(config, workdir)
  shutil.rmtree(loop.secrets_directory(workdir))
  _refused(config, workdir, 'keys.json', 'not found')


def test_a_run_that_never_began_does_not_claim_the_workdir(tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  with monkeypatch.context() as patch, pytest.raises(_Crash):

    def crash(*_):
      raise _Crash

    patch.setattr(loop._Run, 'one_step', crash)
    loop.train(_config(), workdir)
  loop.train(_config(privacy__clip_norm=2.0), workdir)
  assert json.loads((workdir / 'privacy.json').read_text())['clip_norm'] == 2.0


def test_two_processes_never_share_a_run(program, tmp_path):
  workdir = tmp_path / 'run'
  process = _start(program, workdir, '--config.train.steps=400')
  _wait_for_step(process, workdir, 1)
  _refused(_config(train__steps=400), workdir, 'another process')
  process.kill()


def test_a_finished_run_is_left_alone(reference):
  before = sorted(p.stat().st_mtime_ns for p in reference[1].glob('checkpoints/*/*'))
  loop.train(_config(train__steps=_LONG), reference[1])
  assert before == sorted(p.stat().st_mtime_ns for p in reference[1].glob('checkpoints/*/*'))


def test_loss_nan_goes_on_and_says_so(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(
    step_lib,
    'example_loss',
    lambda model, frozen: (
      lambda params, example: sum(jnp.sum(p) for p in jax.tree.leaves(params)) * jnp.nan
    ),
  )
  state = loop.train(_config(), tmp_path / 'run')
  assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(state.params))
  assert 'not finite' in capfd.readouterr().err
  lines = _lines(tmp_path / 'run/diagnostics.private.jsonl')
  assert all(line['unusable_gradients'] == line['examples'] for line in lines)


def test_run_without_privacy_says_so(tmp_path, capfd):
  loop.train(_config(privacy__noise_multiplier=None, privacy__epsilon=np.inf), tmp_path / 'run')
  statement = json.loads((tmp_path / 'run/privacy.json').read_text())
  assert not statement['private'] and statement['epsilon'] == {'pld': None, 'rdp': None}
  assert 'NO privacy' in capfd.readouterr().err


def _refused(config, workdir, *parts):
  with pytest.raises(UserError) as e:
    loop.train(config, pathlib.Path(workdir))
  for part in parts:
    assert str(part) in str(e.value)
  assert '\n' not in str(e.value)


def test_the_strategy_is_checked_before_anything_is_released(tmp_path, monkeypatch):
  def halved(*args):
    result = clipping.CLIPPING_STRATEGIES['vmap'](*args)
    return result._replace(norms=result.norms / 2)

  monkeypatch.setitem(clipping.CLIPPING_STRATEGIES, 'bookkeeping', halved)
  config = _config(privacy__check_clipping=True, train__steps=2)
  with pytest.raises(UserError, match="privacy.clipping: .*'bookkeeping' differs from vmap by 0.5"):
    loop.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()
  config.privacy.check_clipping = False
  assert loop.train(config, tmp_path / 'run').step == 2


def test_the_statement_says_what_auto_chose(tmp_path):
  config = _config(privacy__check_clipping=True, privacy__clip_function='automatic', train__steps=2)
  loop.train(config, tmp_path / 'run')
  statement = json.loads((tmp_path / 'run' / 'privacy.json').read_text())
  assert statement['clipping'] == 'bookkeeping'
  assert statement['clip_function'] == 'Automatic(gamma=0.01)'


def test_bad_runs_are_refused_in_one_line(tmp_path, reference):
  _refused(
    _config(train__steps=_LONG, privacy__clip_norm=2.0),
    reference[1],
    'privacy.clip_norm = 1.0',
    '2.0',
  )
  _refused(_config(privacy__expected_batch_size=401), tmp_path / 'x', 401, 400)
  _refused(_config(data__dataset_size=399), tmp_path / 'x', 'data.dataset_size', 399, 400)
  (tmp_path / 'file').write_text('')
  _refused(_config(), tmp_path / 'file/run', tmp_path / 'file')
  loop.train(_config(train__steps=2), tmp_path / 'gone')
  shutil.rmtree(tmp_path / 'gone')
  _refused(_config(train__steps=2), tmp_path / 'gone', 'gone.secrets', 'remove it')
  _refused(_config(), '/', '--workdir')
  (tmp_path / 'odd').mkdir()
  (tmp_path / 'odd/config.json').write_text('[]')
  shutil.copytree(loop.secrets_directory(tmp_path / 'gone'), tmp_path / 'odd.secrets')
  _refused(_config(), tmp_path / 'odd', 'config.json', 'damaged')


def test_resume_without_keys_is_refused(tmp_path):
  workdir = tmp_path / 'run'
  loop.train(_config(train__steps=2), workdir)
  (loop.secrets_directory(workdir) / 'keys.json').unlink()
  _refused(_config(train__steps=2), workdir, 'keys.json', 'not found')


def test_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device', 'checkpoint')

  monkeypatch.setattr('orbax.checkpoint.CheckpointManager.save', full)
  _refused(_config(), tmp_path / 'run', 'No space left on device', tmp_path / 'run')
