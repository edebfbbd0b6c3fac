"""Runs that start from given weights: which are taken, what is refused, what the statement says."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import config as config_lib
from dpcap import models, privacy
from dpcap.errors import UserError
from dpcap.models import official
from dpcap.models.weight_files import save_weights
from dpcap.training import loop, processes
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.initialization import start_from
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.step import TrainState
from dpcap.training.workdir import publish_statement
from tests import tiny

KEYS = {'name': 'captioner', 'size': 'micro'}
STATEMENT = {'private': False, 'data': {'source': 'scenes', 'generated': True}}


@functools.cache
def make_state(seed, scan_blocks=False, vocab_size=25):
  model = models.make_model(
    **KEYS, image_size=16, vocab_size=vocab_size, scan_blocks=scan_blocks
  )
  init = jax.jit(model.init, out_shardings=Layout(make_mesh()).whole())
  variables = init(jax.random.key(seed), np.zeros((16, 16, 3)), np.zeros(8, int))
  return TrainState(np.int32(0), variables['params'], variables['frozen'], ())


def save(folder, state, step=3):
  """Writes it as a run's checkpoint; returns the workdir."""
  checkpoints = Checkpoints(folder / 'checkpoints')
  checkpoints.save(state._replace(step=np.int32(step)), STATEMENT | {'ledger': 'mark'})
  checkpoints.close()
  return folder


def unrolled(state):
  tree = {'params': state.params, 'frozen': state.frozen}
  return models.unstack_blocks(jax.tree.map(np.asarray, tree))


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(name='other', scope='module')
def _other(tmp_path_factory):
  """The workdir of a run that came to the state of seed 1."""
  return save(tmp_path_factory.mktemp('other') / 'run', make_state(1))


def test_all_is_taken_from_a_workdir_or_its_checkpoint(other):
  for path in (other, other / 'checkpoints/3'):
    start = start_from(str(path), ('all',), make_state(0))
    same(unrolled(start.state), unrolled(make_state(1)))
    assert start.record == {
      'path': str(other / 'checkpoints/3'),
      'parts': ['all'],
      'statement': STATEMENT,
    }
    assert 'from train.model_seed' not in start.said and 'not taken' not in start.said
    shardings = lambda state: [x.sharding for x in jax.tree.leaves(state.params)]
    assert shardings(start.state) == shardings(make_state(0))


def test_all_processes_take_what_the_main_one_finds(other, tmp_path, monkeypatch):
  """A run that goes on beside has a newer checkpoint for one that looks later."""
  found = str(other / 'checkpoints/3')
  monkeypatch.setattr(processes, 'from_main', lambda function: found)
  assert start_from(str(tmp_path), ('all',), make_state(0)).record['path'] == found


def test_parts_are_taken_and_others_left(other):
  """Trained and frozen arrays of a module go together."""
  start = start_from(str(other), ('encoder', 'memory_type_embedding'), make_state(0))
  got, ours, theirs = map(unrolled, (start.state, make_state(0), make_state(1)))
  for collection in ('params', 'frozen'):
    for name, tree in got[collection].items():
      taken = name in ('encoder', 'memory_type_embedding')
      same(tree, (theirs if taken else ours)[collection][name])
  assert start.record['parts'] == ['encoder', 'memory_type_embedding']
  assert 'encoder, memory_type_embedding (' in start.said
  assert 'from train.model_seed: decoder, memory_projection' in start.said
  assert 'not taken: decoder, memory_projection' in start.said


def test_an_average_of_parameters_starts_from_the_weights_too(other):
  state = make_state(0)
  state = state._replace(average=jax.tree.map(jnp.copy, state.params))
  start = start_from(str(other), ('encoder',), state)
  same(*(jax.tree.map(np.asarray, tree) for tree in (start.state.average, start.state.params)))
  # A step donates all of the state: no two of its arrays may be one.
  arrays = jax.tree.leaves((start.state.average, start.state.params))
  pointers = [x.unsafe_buffer_pointer() for x in arrays]
  assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize('from_scanned', [True, False])
def test_blocks_may_be_scanned_on_one_side(tmp_path, from_scanned):
  save(tmp_path / 'run', make_state(1, from_scanned))
  start = start_from(str(tmp_path / 'run'), ('all',), make_state(0, not from_scanned))
  assert jax.tree.structure(start.state) == jax.tree.structure(make_state(0, not from_scanned))
  same(unrolled(start.state), unrolled(make_state(1, from_scanned)))


def test_an_official_file_is_unknown_and_named_by_its_hash(tmp_path):
  path = tmp_path / 'base-eps7.safetensors'
  save_weights(path, official.to_official(unrolled(make_state(1)), KEYS, 16, 8))
  start = start_from(str(path), ('all',), make_state(0))
  same(unrolled(start.state), unrolled(make_state(1)))
  origin = start.record['statement']['origin']
  assert origin['file'] == path.name and len(origin['sha256']) == 64
  assert 'epsilon about 7' in origin['claims']


def changed(state, name, value):
  """The state with that array of the encoder's trained ones, or without."""
  encoder = {**state.params['encoder'], name: value}
  encoder = {key: x for key, x in encoder.items() if x is not None}
  return state._replace(params={**state.params, 'encoder': encoder})


@pytest.mark.parametrize(
  'state, parts, message',
  [
    (
      changed(make_state(1), 'norm', None),
      ('all',),
      "has no 'encoder/norm/bias', which this model needs",
    ),
    (
      changed(make_state(1), 'extra', np.zeros(3)),
      ('encoder',),
      "has 'encoder/extra', which this model lacks",
    ),
    (
      make_state(1, vocab_size=26),
      ('all',),
      r"has 'decoder/logits/bias' of shape \(26,\); this model needs \(25,\)",
    ),
    (make_state(1), ('encoder', 'head'), "'head'; allowed: 'all' alone, or some of decoder, enc"),
    (make_state(1), ('all', 'encoder'), "'all'; allowed: 'all' alone"),
  ],
)
def test_what_does_not_match_is_named(tmp_path, state, parts, message):
  save(tmp_path / 'run', state)
  with pytest.raises(UserError, match=message) as e:
    start_from(str(tmp_path / 'run'), parts, make_state(0))
  assert str(e.value).startswith('train.init') and '\n' not in str(e.value)


def test_what_differs_elsewhere_does_not_matter_to_a_part(tmp_path):
  save(tmp_path / 'run', make_state(1, vocab_size=26))
  start = start_from(str(tmp_path / 'run'), ('encoder',), make_state(0))
  same(start.state.params['encoder'], make_state(1, vocab_size=26).params['encoder'])


def test_a_captioner_takes_the_encoder_of_a_masked_autoencoder(tmp_path):
  """The paper's first stage, with the captioner's own encoder in it."""
  keys = dict(size='micro', image_size=16, vocab_size=1)
  keys |= dict(encoder_of='captioner', decoder_width=32, decoder_depth=1)
  mae = models.make_model('mae', **keys)
  image, key = np.zeros((16, 16, 3)), np.zeros(2, np.uint32)
  variables = jax.jit(mae.init)(jax.random.key(2), image, key)
  first = TrainState(np.int32(0), variables['params'], variables['frozen'], ())
  save(tmp_path / 'first', first)
  start = start_from(str(tmp_path / 'first'), ('encoder',), make_state(0))
  for collection in ('params', 'frozen'):
    same(unrolled(start.state)[collection]['encoder'], unrolled(first)[collection]['encoder'])
  with pytest.raises(UserError, match="has 'decoder/"):
    start_from(str(tmp_path / 'first'), ('all',), make_state(0))


def test_what_another_model_trained_may_be_kept_fixed(tmp_path):
  """Arrays go by their names: a class token that was trained is a frozen one here."""
  state = make_state(1)
  token = np.arange(16, dtype=np.float32)
  frozen = {**state.frozen, 'encoder': {'type_embedding': token + 1}}
  save(tmp_path / 'run', changed(state, 'class_token', token)._replace(frozen=frozen))
  start = start_from(str(tmp_path / 'run'), ('encoder',), make_state(0))
  same(start.state.frozen['encoder'], {'class_token': token, 'type_embedding': token + 1})
  assert 'class_token' not in start.state.params['encoder']


@pytest.mark.parametrize(
  'damage, message',
  [
    (shutil.rmtree, 'holds no checkpoint'),
    (lambda run: (run / 'checkpoints/3/model/manifest.ocdbt').unlink(), 'holds no checkpoint'),
    (lambda run: shutil.rmtree(run / 'checkpoints/3/model/d'), 'not whole'),
  ],
)
def test_what_cannot_be_read_is_named(tmp_path, damage, message):
  damage(save(tmp_path / 'run', make_state(1)))
  with pytest.raises(UserError, match=f'train.init: {tmp_path}/run.*{message}') as e:
    start_from(str(tmp_path / 'run'), ('all',), make_state(0))
  assert '\n' not in str(e.value)


def test_parts_without_weights_are_refused():
  config = tiny.get_config()
  config.train.init_parts = ('encoder',)
  with pytest.raises(UserError, match='train.init_parts .* goes with train.init, which is None'):
    config_lib.validate(config)
  config.train.init = 'somewhere'
  config_lib.validate(config)
  config.train.init_parts = ()
  with pytest.raises(UserError, match='train.init_parts'):
    config_lib.validate(config)


MLP = {'name': 'mlp', 'classes': 8, 'widths': (8,)}  # the fastest to compile


def make_mlp_state(seed):
  model = models.make_model(**MLP, image_size=16, vocab_size=1)
  init = jax.jit(model.init, out_shardings=Layout(make_mesh()).whole())
  variables = init(jax.random.key(seed), np.zeros((16, 16, 3)), np.int32(0))
  return TrainState(np.int32(0), variables['params'], {}, ())


def _config(**train):
  """Two steps that move nothing."""
  config = tiny.get_config()
  config.model, config.evals = config_lib.model_config(**MLP), {}
  config.privacy.clipping = 'vmap'
  config.train.update(dict(steps=2, checkpoint_every=1) | train)
  config.optimizer.learning_rate = 1e-30
  return config


def _statement(workdir):
  publish_statement(workdir)  # which a crash leaves undone
  return json.loads((workdir / 'privacy.json').read_text())


class _Crash(Exception):
  pass


def test_a_run_starts_from_another_goes_on_without_it_and_says_so(tmp_path, monkeypatch, capfd):
  first, second = tmp_path / 'first', tmp_path / 'second'
  save(first, make_mlp_state(1))
  config = _config(init=str(first))
  began, one_step, record = [], loop._Run.one_step, privacy.KeyStore.record

  def one_step_or_crash(self, stop):
    if self.done == 1:
      raise _Crash
    began.append(unrolled(self.state))
    return one_step(self, stop)

  def record_or_differ(self, step, digest):
    return record(self, step, digest) and len(began) > 1

  # Step 1 comes out in other bits than before: the run goes back to where it started.
  with monkeypatch.context() as patch, pytest.raises(_Crash):
    patch.setattr(loop._Run, 'one_step', one_step_or_crash)
    patch.setattr(privacy.KeyStore, 'record', record_or_differ)
    loop.train(config, second)
  assert len(began) == 2
  for variables in began:
    same(variables, unrolled(make_mlp_state(1)))
  assert f'starts from {first}/checkpoints/3: encoder, head (' in capfd.readouterr().err
  init = _statement(second)['init']
  assert init['path'] == f'{first}/checkpoints/3' and init['covered']
  assert 'generated data alone (scenes): nothing private' in _statement(second)['text']

  shutil.rmtree(first)
  state = loop.train(config, second)
  err = capfd.readouterr().err
  assert 'resuming after step 1' in err and 'starts from' not in err
  assert _statement(second)['steps'] == 2 and _statement(second)['init'] == init
  got, theirs = unrolled(state), unrolled(make_mlp_state(1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-20), got, theirs)
  with pytest.raises(UserError, match='train.init = '):
    loop.train(_config(), second)
  # The next generation carries both.
  following = start_from(str(second), ('encoder',), make_mlp_state(0)).record
  assert following['statement']['init'] == init
  assert following['statement']['data'] == {'source': 'scenes', 'generated': True}
