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

from dpcap import data
from dpcap.ending import STOPPED
from dpcap.errors import UserError
from dpcap.privacy import clipping
from dpcap.training import build, loop
from dpcap.training import step as step_lib
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.fatal_records import FatalRecords
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
  shapes = build.make_transform(config, tokenizer=None).shapes
  averaged = config.train.ema_decay is not None
  like = step_lib.init_state(model, optimizer, layout, shapes, 0, averaged)
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
  assert process.returncode == STOPPED, output
  assert re.search(r'stopped after \d+ steps, saved', output)
  saved = [int(p.name) for p in (workdir / 'checkpoints').iterdir()]
  assert len(saved) == 1 and 3 <= saved[0] < _LONG
  config = _config(train__steps=_LONG)
  loop.train(config, workdir)
  jax.tree.map(np.testing.assert_array_equal, _final(config, workdir), reference[0])


def test_a_run_outlives_its_workers(program, tmp_path, reference):
  workdir = tmp_path / 'run'
  process = _start(program, workdir, '--config.data.workers=1')
  _wait_for_step(process, workdir, 3)
  for pid in _children(process.pid):
    os.kill(pid, signal.SIGKILL)
  errors = process.communicate()[1]
  assert process.returncode == 0, errors
  assert re.search(r'warning: data worker 0 died \(SIGKILL\).*another one goes on', errors)
  config = _config(train__steps=_LONG)
  jax.tree.map(np.testing.assert_array_equal, _final(config, workdir), reference[0])


@dataclasses.dataclass(frozen=True)
class _Deadly(data.Scenes):
  """Scenes of which one ends the process that draws it."""

  deadly: int = -1

  def __getitem__(self, index):
    if index == self.deadly:
      signal.raise_signal(signal.SIGKILL)
    return super().__getitem__(index)


def _drawn_first_in(workdir, step):
  """A record of that step which is in no step before it."""
  key = _keys(workdir)['sampling']
  draw = build.make_plan(_config(), 400).make_sampler(tuple(key)).draw
  return int(np.setdiff1d(draw(step), np.concatenate([draw(s) for s in range(step)]))[0])


def test_a_record_that_ends_its_worker_contributes_zero_from_that_step_on(
  finished, tmp_path, monkeypatch, capfd
):
  """A step in which it had contributed is another release when it is done again."""
  workdir, deadly = _copy(finished, tmp_path / 'deadly'), _drawn_first_in(finished, 3)
  _take_away(workdir, 4, 6)
  make = build.make_training_source
  source = lambda config: _Deadly(**dataclasses.asdict(make(config)), deadly=deadly)
  with monkeypatch.context() as patch:
    patch.setattr(build, 'make_training_source', source)
    loop.train(_fast(data__workers=1), workdir)
  assert f'record {deadly}, and a process that read nothing else died (SIGKILL): it is a bad' in (
    capfd.readouterr().err
  )
  # Step 4 came out otherwise than when the record contributed: all since step 2 are lost.
  assert _statement(workdir)['releases'] == 2 * tiny.STEPS - 2
  path = loop.secrets_directory(workdir) / 'fatal_records.0.private.jsonl'
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  assert [(line['record'], line['step']) for line in _lines(path)][0] == (deadly, 3)


@pytest.mark.parametrize('since, lost', [(tiny.STEPS, 0), (3, tiny.STEPS - 2)])
def test_what_is_known_of_fatal_records_decides_whether_a_step_is_the_same(finished, since, lost):
  """One that was found in a later step changes none before; one of other data changes nothing."""
  record = _drawn_first_in(finished, 3)
  _take_away(finished, 4, 6)
  source = build.make_training_source(_fast())
  for process, fingerprint in ((1, source.fingerprint), (0, 'of other data')):
    file = FatalRecords(loop.secrets_directory(finished), process, fingerprint)
    file.add(record, since if process else 2)
  loop.train(_fast(), finished)
  assert _statement(finished)['releases'] == tiny.STEPS + lost


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
  excluded = ' '.join(statement['not_covered'])
  for words in ('diagnostics', 'hyper-parameters', 'vocabulary or filters', 'evaluations'):
    assert words in excluded
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


def _fast(**changes):
  return _config(privacy__clipping='vmap', privacy__seed=None, **changes)


@pytest.fixture(scope='module', name='crashed_run')
def _crashed_run(tmp_path_factory):
  """The workdir of a run that saved after step 2 and died after step 4."""
  workdir = tmp_path_factory.mktemp('crashed') / 'run'
  with pytest.MonkeyPatch.context() as patch, pytest.raises(_Crash):
    _crash_after(patch, 4)
    loop.train(_fast(), workdir)
  return workdir


@pytest.fixture(name='crashed')
def _crashed(crashed_run, tmp_path):
  """A copy of it, to go on with."""
  return _copy(crashed_run, tmp_path / 'run')


@pytest.fixture(scope='module', name='finished_run')
def _finished_run(crashed_run, tmp_path_factory):
  """The same run, gone on to its end with the same bits."""
  workdir = _copy(crashed_run, tmp_path_factory.mktemp('finished') / 'run')
  loop.train(_fast(), workdir)
  assert _statement(workdir)['releases'] == tiny.STEPS
  return workdir


@pytest.fixture(name='finished')
def _finished(finished_run, tmp_path):
  """A copy of it, to go on with."""
  return _copy(finished_run, tmp_path / 'finished')


def _copy(workdir, to):
  shutil.copytree(loop.secrets_directory(workdir), loop.secrets_directory(to))
  return pathlib.Path(shutil.copytree(workdir, to))


def _keys(workdir):
  return json.loads((loop.secrets_directory(workdir) / 'keys.json').read_text())


def _statement(workdir):
  return json.loads((workdir / 'privacy.json').read_text())


# Sums of other physical batches round differently.
_OTHER_BITS = dict(mesh__physical_batch=4)


def test_steps_that_come_out_otherwise_get_fresh_noise_and_count_again(crashed, capfd):
  """Steps 3 and 4 were computed, not saved, and can't be repeated bit for bit elsewhere."""
  before = _keys(crashed)
  loop.train(_fast(**_OTHER_BITS), crashed)
  after = _keys(crashed)
  assert before['noise'] != after['noise'] and before['sampling'] != after['sampling']
  assert [era['start'] for era in after['eras']] == [0, 2]
  statement = _statement(crashed)
  assert (statement['steps'], statement['releases']) == (tiny.STEPS, tiny.STEPS + 2)
  epsilon = build.make_plan(_config(), 400).epsilon(tiny.STEPS + 2)
  assert statement['epsilon']['pld'] == pytest.approx(epsilon)
  screen = capfd.readouterr().err
  assert 'step 3, done again, came out in other bits' in screen and 'fresh keys' in screen
  assert '2 noisy gradients were computed' in screen and f'epsilon {epsilon:.3f}' in screen


def test_nothing_is_kept_of_a_step_that_came_out_otherwise(crashed, monkeypatch):
  """Not on disk, not on the screen: what is written after it is of the new step 3."""
  events, update = [], step_lib.make_step
  steps = []

  def spied(*args, **kwargs):
    step = update(*args, **kwargs)

    def one(*inputs):
      out = step.update(*inputs)
      steps.append(float(out[2]['loss']))
      return out

    return dataclasses.replace(step, update=one)

  monkeypatch.setattr(loop, 'make_step', spied)
  for place, name in (
    (loop.Progress, 'after_step'),
    (loop.metrics.MetricWriter, 'write'),
    (Checkpoints, 'save'),
  ):
    real = getattr(place, name)

    def spy(self, *args, _real=real, _name=name):
      events.append((_name, len(steps)))
      return _real(self, *args)

    monkeypatch.setattr(place, name, spy)
  loop.train(_fast(**_OTHER_BITS), crashed)
  # Five steps were computed, of which the first was thrown away before anything was said of it.
  assert len(steps) == 1 + tiny.STEPS - 2
  assert min(computed for _, computed in events) == 2
  lines = _lines(crashed / 'diagnostics.private.jsonl')
  assert [line['step'] for line in lines] == list(range(1, tiny.STEPS + 1))
  assert [line['loss'] for line in lines[2:]] == steps[1:]


def test_a_later_step_that_comes_out_otherwise_takes_the_earlier_ones_with_it(
  crashed, monkeypatch
):
  """Step 3 is repeated exactly, step 4 is not: both are lost, and done under fresh keys."""
  diagnostics, make = crashed / 'diagnostics.private.jsonl', step_lib.make_step
  old = _lines(diagnostics)
  updates = []

  def spied(*args, **kwargs):
    step = make(*args, **kwargs)

    def other_bits_at_the_second(*inputs):
      *out, digest = step.update(*inputs)
      updates.append(int(out[0].step))
      return *out, digest ^ (len(updates) == 2)

    return dataclasses.replace(step, update=other_bits_at_the_second)

  monkeypatch.setattr(loop, 'make_step', spied)
  loop.train(_fast(), crashed)
  assert updates == [3, 4, 3, 4, 5, 6]
  assert _statement(crashed)['releases'] == tiny.STEPS + 2
  lines = _lines(diagnostics)
  assert [line['step'] for line in lines] == list(range(1, tiny.STEPS + 1))
  assert lines[:2] == old[:2]
  # Fresh keys draw other examples.
  assert lines[2]['loss'] != old[2]['loss']


def test_exact_replay_counts_once_wherever_it_runs(crashed, monkeypatch):
  """What only might have changed the bits does not count: other settings, other code."""
  before = _keys(crashed)
  monkeypatch.setenv('JAX_DEFAULT_MATMUL_PRECISION', 'highest')
  monkeypatch.setattr('importlib.metadata.version', lambda name: 'another')
  loop.train(_fast(mesh__batches_per_chunk=1), crashed)
  assert _statement(crashed)['releases'] == tiny.STEPS
  assert _keys(crashed)['noise'] == before['noise']


def test_what_a_description_of_the_machine_would_miss_is_seen(crashed, monkeypatch):
  """One bit of one sum, whatever the reason."""
  add = step_lib.privacy.RunningSum.value

  def value(self):
    leaves, tree = jax.tree.flatten(add(self))
    leaves[3] = leaves[3].at[(0,) * leaves[3].ndim].multiply(1 + 2**-12)
    return tree.unflatten(leaves)

  monkeypatch.setattr(step_lib.privacy.RunningSum, 'value', value)
  loop.train(_fast(), crashed)
  assert _statement(crashed)['releases'] == tiny.STEPS + 2


def test_a_step_that_was_never_recorded_is_no_second_release(crashed, monkeypatch):
  """Killed between begin and record, and resumed where it comes out otherwise."""

  def crash(*_):
    raise _Crash

  with monkeypatch.context() as patch, pytest.raises(_Crash):
    record = loop.privacy.KeyStore.record
    patch.setattr(
      loop.privacy.KeyStore,
      'record',
      lambda store, step, digest: (crash if step == 4 else record)(store, step, digest),
    )
    loop.train(_fast(), crashed)
  assert _keys(crashed)['started'] == 5
  loop.train(_fast(**_OTHER_BITS), crashed)
  assert _statement(crashed)['releases'] == tiny.STEPS


def test_events_of_a_step_come_in_the_order_that_keeps_the_count(tmp_path, monkeypatch):
  """On disk before noise is drawn: it began. Before anything leaves: what it released."""
  events, make = [], step_lib.make_step

  def noted(name, function):
    def call(*args, **kwargs):
      events.append(name)
      return function(*args, **kwargs)

    return call

  def spied(*args, **kwargs):
    step = make(*args, **kwargs)
    return dataclasses.replace(step, update=noted('update', step.update))

  monkeypatch.setattr(loop, 'make_step', spied)
  for place, name in (
    (loop.privacy.KeyStore, 'begin'),
    (loop.privacy.KeyStore, 'record'),
    (loop.processes, 'gather'),
    (loop.metrics.MetricWriter, 'write'),
    (loop.Progress, 'after_step'),
    (loop._Run, '_warn_once'),
    (Checkpoints, 'save'),
    (loop.Evaluations, 'run'),
  ):
    monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
  # Every step has something to say, of a record that cannot be used.
  draw = loop.data.LogicalBatches.__getitem__
  monkeypatch.setattr(
    loop.data.LogicalBatches,
    '__getitem__',
    lambda self, i: [c._replace(bad=1, reasons=['why']) for c in draw(self, i)],
  )
  loop.train(_fast(train__evaluate_at=(2,)), tmp_path / 'run')
  assert events[0] == 'begin'
  steps = ' '.join(events).split('begin ')[1:]
  assert len(steps) == tiny.STEPS
  for step in steps:
    assert step.split()[:4] == ['update', 'record', 'gather', '_warn_once']
    assert not {'update', 'record', '_warn_once'} & set(step.split()[4:])
  assert {'write', 'after_step', 'save', 'run'} <= set(steps[1].split())


def _take_away(workdir, *steps):
  for step in steps:
    shutil.rmtree(workdir / 'checkpoints' / str(step))


def test_the_checkpoints_of_a_copy_are_refused(crashed, finished):
  """The copy went on under fresh keys; at its parameters this run's noise must not come again."""
  loop.train(_fast(**_OTHER_BITS), crashed)
  _take_away(finished, 4, 6)
  shutil.copytree(crashed / 'checkpoints/4', finished / 'checkpoints/4')
  before, files = _keys(finished), sorted(finished.rglob('*'))
  _refused(_fast(), finished, 'checkpoint at step 4', 'a copy of this one', 'bring back')
  assert _keys(finished) == before and sorted(finished.rglob('*')) == files


def test_an_older_checkpoint_is_compared_step_by_step(finished):
  """The newest ones were taken away; all steps since are done again."""
  _take_away(finished, 4, 6)
  loop.train(_fast(), finished)
  assert _statement(finished)['releases'] == tiny.STEPS


def test_damaged_checkpoints_are_as_if_they_had_been_taken_away(finished, capfd):
  """Neither for an old copy of the keys nor for another model is that taken."""
  shutil.rmtree(finished / 'checkpoints/6/model')
  (finished / 'checkpoints/9').mkdir()
  before = _keys(finished)
  loop.train(_fast(), finished)
  errors = capfd.readouterr().err
  assert 'checkpoints/9: not whole (' in errors and 'checkpoints/6: not whole (' in errors
  assert 'whole checkpoints: 2, 4\n' in errors and 'resuming after step 4' in errors
  assert _statement(finished)['releases'] == tiny.STEPS and _keys(finished) == before


def test_all_steps_since_an_older_checkpoint_are_lost_together(finished):
  _take_away(finished, 4, 6)
  loop.train(_fast(**_OTHER_BITS), finished)
  assert _statement(finished)['releases'] == 2 * tiny.STEPS - 2


def test_evaluations_of_steps_to_come_are_done_again(crashed):
  """Of a checkpoint that was taken away: under fresh keys step 4 has other parameters."""
  early, late = (crashed / f'evals/step_{step}/written.json' for step in (2, 4))
  for path in (early, late):
    path.parent.mkdir(parents=True)
    path.write_text('{}')
  loop.train(_fast(train__evaluate_at=(2, 4), **_OTHER_BITS), crashed)
  assert early.read_text() == '{}' and json.loads(late.read_text())['n'] == 5


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


@pytest.mark.parametrize('where', ['begin', 'update', 'record', 'report', 'checkpoint'])
def test_crash_anywhere_in_a_step_resumes_to_the_same_bits(tmp_path, monkeypatch, reference, where):
  """Before the ledger, before, in and after the release, and while saving."""
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
        elif where == 'record':
          run._store.record = crash
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


def test_other_data_or_plan_is_never_replayed_under_the_same_noise(crashed, monkeypatch):
  """N is the source's own: it grew between the crash and the restart."""
  make = build.make_training_source
  with monkeypatch.context() as patch:
    larger = lambda config: dataclasses.replace(make(config), size=401)
    patch.setattr(build, 'make_training_source', larger)
    _refused(_fast(), crashed, 'dataset_size = 400', '401')
  # Same N, other records: their gradients differ, so they get other noise and count anew.
  other = lambda config: dataclasses.replace(make(config), split='validation')
  monkeypatch.setattr(build, 'make_training_source', other)
  loop.train(_fast(), crashed)
  assert _statement(crashed)['releases'] == tiny.STEPS + 2


def test_a_statement_that_a_crash_left_behind_is_mended(finished):
  """Killed between the last checkpoint and its statement: nothing is left to do but this."""
  path = finished / 'privacy.json'
  right = path.read_text()
  path.write_text((finished / 'checkpoints/4/privacy/metadata').read_text())
  loop.train(_fast(), finished)
  assert path.read_text() == right and _statement(finished)['steps'] == tiny.STEPS


@pytest.mark.parametrize('steps', [2, 0])
def test_a_statement_is_mended_before_the_next_step(crashed, monkeypatch, steps):
  """Also where all checkpoints were taken away and the run begins again."""
  (crashed / 'privacy.json').write_text('{"steps": 1}')
  if not steps:
    shutil.rmtree(crashed / 'checkpoints')

  def crash(*_):
    raise _Crash

  monkeypatch.setattr(loop._Run, 'one_step', crash)
  with pytest.raises(_Crash):
    loop.train(_fast(), crashed)
  assert _statement(crashed)['steps'] == 2 if steps else not (crashed / 'privacy.json').exists()


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
  statement = _statement(tmp_path / 'run')
  assert not statement['private'] and statement['epsilon'] == {'pld': None, 'rdp': None}
  assert 'NO privacy' in capfd.readouterr().err


def test_a_simulation_says_whose_it_is_and_what_it_is_not(tmp_path, capfd):
  loop.train(_config(privacy__simulation_divisor=5, train__steps=2), tmp_path / 'run')
  statement = _statement(tmp_path / 'run')
  assert not statement['private'] and statement['epsilon'] == {'pld': None, 'rdp': None}
  assert (statement['expected_batch_size'], statement['noise_multiplier']) == (4, 0.8)
  assert statement['simulates']['expected_batch_size'] == 20
  assert statement['clipping'] != 'none'
  said = capfd.readouterr().err
  epsilon = statement['simulates']['epsilon']['pld']
  assert f'NO privacy, a simulation of batch 20 (epsilon {epsilon:.3f} (PLD)' in said
  assert 'batch 4 ' in said
  lines = _lines(tmp_path / 'run' / 'metrics.jsonl')
  assert [line['epsilon'] for line in lines] == [None, None]


def _refused(config, workdir, *parts):
  with pytest.raises(UserError) as e:
    loop.train(config, pathlib.Path(workdir))
  for part in parts:
    assert str(part) in str(e.value)
  assert '\n' not in str(e.value)


def test_the_strategy_is_checked_before_anything_is_released(tmp_path, monkeypatch):
  def halved(problem):
    result = clipping.CLIPPING_STRATEGIES['vmap'](problem)
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


@pytest.mark.parametrize('name', ['.', 'sub/..', 'run/', './sub/../run', 'link'])
def test_keys_lie_beside_the_workdir_by_whatever_path_it_is_named(tmp_path, monkeypatch, name):
  """One run has one ledger: a link to the workdir is the workdir."""
  (tmp_path / 'run/sub').mkdir(parents=True)
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'run')
  monkeypatch.chdir(tmp_path / 'run' if name in ('.', 'sub/..') else tmp_path)
  assert loop.secrets_directory(pathlib.Path(name)) == tmp_path / 'run.secrets'


def test_a_workdir_named_with_dots_keeps_its_keys_out(tmp_path, monkeypatch):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'run')
  (tmp_path / 'vault').mkdir()
  (tmp_path / 'run.secrets').symlink_to(tmp_path / 'vault')  # keys may be kept elsewhere
  monkeypatch.chdir(tmp_path / 'run')
  config = _fast(train__steps=2)
  loop.train(config, pathlib.Path('.'))
  loop.train(config, tmp_path / 'link')
  assert (tmp_path / 'vault/keys.json').exists()
  assert stat.S_IMODE((tmp_path / 'vault').stat().st_mode) == 0o700
  assert not list((tmp_path / 'run').rglob('keys.json'))
  assert {path.name for path in tmp_path.iterdir()} == {'run', 'link', 'vault', 'run.secrets'}


def test_64_bits_are_refused_before_anything_is_made(tmp_path):
  with jax.enable_x64(True):
    _refused(_config(), tmp_path / 'run', 'JAX_ENABLE_X64')
  assert not list(tmp_path.iterdir())


def _private(workdir):
  return {path.name: stat.S_IMODE(path.stat().st_mode) for path in workdir.rglob('*.private*')}


def test_what_is_private_is_readable_by_the_owner_only(crashed, monkeypatch):
  """From the moment that it is there, and where an older file was open to all."""
  for path in crashed.rglob('*.private*'):
    path.chmod(0o666)
  seen, real = [], os.open

  def watched(path, flags, mode=0o777, **kwargs):
    if '.private.' in pathlib.Path(path).name and flags & os.O_CREAT:
      seen.append(mode)
    return real(path, flags, mode, **kwargs)

  monkeypatch.setattr(os, 'open', watched)
  before = os.umask(0)
  try:
    loop.train(_fast(), crashed)
  finally:
    os.umask(before)
  modes = _private(crashed)
  assert set(modes.values()) == {0o600}, modes
  assert len(modes) == 3 and 'diagnostics.private.jsonl' in modes
  assert seen and set(seen) == {0o600}
  assert stat.S_IMODE((crashed / 'metrics.jsonl').stat().st_mode) == 0o666


def test_draws_of_nobody_are_json_and_no_warning(tmp_path, caplog):
  config = _fast(privacy__expected_batch_size=1, privacy__noise_multiplier=9.0, train__steps=8)
  config.privacy.seed = 1
  loop.train(config, tmp_path / 'run')

  def refuse(name):
    raise AssertionError(f'{name} is no JSON')

  text = (tmp_path / 'run/diagnostics.private.jsonl').read_text()
  lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
  empty = [line for line in lines if line['examples'] == 0]
  assert 0 < len(empty) < 8
  assert all((line['loss'] is None) == (line['examples'] == 0) for line in lines)
  assert not [r for r in caplog.records if 'NaN' in r.getMessage()]
