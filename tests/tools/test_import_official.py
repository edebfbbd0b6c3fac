"""From the reference's weights to a checkpoint and back."""

import json

import jax
import numpy as np
import pytest

from dpcap import models
from dpcap.models import official
from dpcap.models.weight_files import save_weights, sha256
from dpcap.training.checkpoints import read_model
from dpcap.training.damage import damage_of_arrays
from dpcap.training.evaluation import Evaluations, restore
from tests import tiny
from tools import export_official, import_official


def _config():
  """As the weights below."""
  config = tiny.get_config()
  config.evals = {}
  return config


@pytest.fixture(name='weights', scope='module')
def _weights(tmp_path_factory):
  """A file of the reference's names, and our variables that are in it."""
  config = _config()
  variables = jax.tree.map(np.asarray, Evaluations(config).untrained)
  path = tmp_path_factory.mktemp('weights') / 'base-eps7.safetensors'
  keys = config.model.to_dict()
  save_weights(path, official.to_official(variables, keys, 16, 8))
  return path, variables


@pytest.fixture(name='imported', scope='module')
def _imported(weights, tmp_path_factory):
  out = tmp_path_factory.mktemp('imported') / 'out'
  assert import_official.main([str(weights[0]), str(out)]) == 0
  return out


def test_what_is_imported_is_a_checkpoint_that_evaluates(weights, imported, tmp_path):
  checkpoint, variables = restore(Evaluations(_config()), str(imported), tmp_path / 'elsewhere')
  assert checkpoint == imported / 'checkpoints/0' and damage_of_arrays(checkpoint) is None
  jax.tree.map(np.testing.assert_array_equal, variables, weights[1])
  assert restore(Evaluations(_config()), str(checkpoint), tmp_path)[0] == checkpoint


def test_config_and_line_say_what_the_file_is_for(weights, imported, tmp_path, capsys):
  config = json.loads((imported / 'config.json').read_text())
  assert config['model']['size'] == 'micro' and config['model']['patch_size'] is None
  assert config['data']['image_size'] == 16 and config['data']['text_length'] == 8
  assert config['data']['tokenizer'] == 'wordpiece'
  assert import_official.main([str(weights[0]), str(tmp_path / 'again')]) == 0
  count = sum(x.size for x in jax.tree.leaves(weights[1]['params']))
  assert json.loads(capsys.readouterr().out) == {
    'model': {'name': 'captioner', 'size': 'micro', 'patch_size': None},
    'image_size': 16,
    'text_length': 8,
    'vocab_size': 25,
    'parameters': count,
    'sha256': sha256(weights[0]),
    'checkpoint': str(tmp_path / 'again/checkpoints/0'),
  }


def test_the_statement_vouches_for_nothing(weights, imported):
  statement = json.loads((imported / 'privacy.json').read_text())
  assert statement['private'] is False and set(statement['epsilon'].values()) == {None}
  digest = sha256(weights[0])
  assert statement['origin']['file'] == 'base-eps7.safetensors'
  assert statement['origin']['sha256'] == digest
  for words in ('NO privacy guarantee', digest, 'Claimed, not proven', 'epsilon about 7'):
    assert words in statement['text']


def test_there_and_back_in_the_same_bits(weights, imported, tmp_path, capsys):
  out = tmp_path / 'back.safetensors'
  assert export_official.main([str(imported), str(out)]) == 0
  assert out.read_bytes() == weights[0].read_bytes()
  line = json.loads(capsys.readouterr().out)
  assert line['model'] == 'captioner' and line['bytes'] == out.stat().st_size
  again = tmp_path / 'again'
  assert import_official.main([str(out), str(again)]) == 0
  jax.tree.map(
    np.testing.assert_array_equal,
    read_model(again / 'checkpoints/0'),
    read_model(imported / 'checkpoints/0'),
  )


def test_npz_as_tools_make_oracle_writes_it(weights, tmp_path):
  arrays = official.to_official(weights[1], _config().model.to_dict(), 16, 8)
  path = tmp_path / 'x.npz'
  beside = {'meta': np.array('{}'), 'in/tokens': np.zeros(3, int)}
  np.savez_compressed(path, **{f'param/{name}': x for name, x in arrays.items()}, **beside)
  assert import_official.main([str(path), str(tmp_path / 'out')]) == 0
  variables = read_model(tmp_path / 'out/checkpoints/0')
  jax.tree.map(np.testing.assert_array_equal, variables, weights[1])
  statement = json.loads((tmp_path / 'out/privacy.json').read_text())
  assert statement['origin']['claims'] is None and 'Claimed' not in statement['text']


def test_a_model_of_scanned_blocks_is_exported_alike(weights, imported, tmp_path, monkeypatch):
  """What a checkpoint holds then is stacked."""
  keys = dict(size='micro', image_size=16, vocab_size=25, scan_blocks=True)
  model = models.make_model('captioner', **keys)
  like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((16, 16, 3)), np.zeros(8, int))
  stacked = models.stack_blocks(weights[1], like)
  assert 'blocks' in stacked['params']['encoder']
  monkeypatch.setattr(export_official, 'read_model', lambda checkpoint: stacked)
  assert export_official.main([str(imported), str(tmp_path / 'x.safetensors')]) == 0
  assert (tmp_path / 'x.safetensors').read_bytes() == weights[0].read_bytes()


def test_a_masked_autoencoder(tmp_path, capsys):
  """As ViP's; its positions were trained."""
  made = models.MAE(4, 16, 1, 2, 32, 1, 16, train_positions=True)
  shapes = jax.eval_shape(made.init, jax.random.key(0), np.zeros((8, 8, 3)), np.zeros(2, np.uint32))
  draw = lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
  keys = {'name': 'mae', 'size': 'micro', 'patch_size': 4, 'decoder_width': 32, 'decoder_depth': 1}
  keys |= {'decoder_heads': 16, 'encoder_of': 'vip', 'train_positions': True}
  variables = {'frozen': {}} | jax.tree.map(draw, shapes)
  path, out, back = (tmp_path / name for name in ('x.safetensors', 'out', 'back.safetensors'))
  save_weights(path, official.to_official(variables, keys, 8, 0))
  assert import_official.main([str(path), str(out)]) == 0
  line = json.loads(capsys.readouterr().out)
  assert line['model'] == keys and line['text_length'] is None and line['image_size'] == 8
  assert keys.items() <= json.loads((out / 'config.json').read_text())['model'].items()
  assert export_official.main([str(out), str(back)]) == 0
  assert back.read_bytes() == path.read_bytes()


def test_refusals_are_one_line(weights, imported, tmp_path, capsys):
  for module, arguments, message in (
    (import_official, [tmp_path / 'no.npz', tmp_path / 'a'], 'no.npz: no such file'),
    (import_official, [weights[0], imported], 'is not empty'),
    (import_official, [weights[0], weights[0]], 'cannot be written'),
    (export_official, [tmp_path / 'no', tmp_path / 'x.safetensors'], 'holds no checkpoint'),
    (export_official, [imported, tmp_path / 'x.pth'], 'must end in .safetensors'),
  ):
    assert module.main([*map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.startswith('error: ')
    assert output.err.count('\n') == 1 and not output.out
  assert not (tmp_path / 'a').exists()
