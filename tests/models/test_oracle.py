"""Agreement with reference results: our own float64 file, and the reference implementation's."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.privacy import CLIPPING_STRATEGIES
from tools import check_oracle, make_oracle

SHIPPED = pathlib.Path(__file__).with_name('captioner_oracle.npz')
# Made by the reference implementation; it does not come with the repository.
REFERENCE = pathlib.Path(
  os.environ.get('DPCAP_ORACLE') or SHIPPED.parents[2].parent / 'shared/oracle/captioner.npz'
)
TOLERANCE = 1e-4


@pytest.mark.parametrize('path', [p for p in (SHIPPED, REFERENCE) if p.exists()], ids=str)
def test_captioner_agrees_with(path):
  errors = check_oracle.oracle_errors(check_oracle.read_oracle(str(path)))
  assert list(errors) == ['loss', 'encoder', 'features', 'grad_norm', 'clipped_sum']
  assert errors['clipped_sum'].keys() == CLIPPING_STRATEGIES.keys()
  by_strategy = errors.pop('clipped_sum')
  flat = errors | by_strategy
  assert all(0 <= error <= TOLERANCE for error in flat.values()), flat


@pytest.fixture(name='mae_arrays', scope='module')
def _mae_arrays():
  with jax.enable_x64(True):
    return make_oracle.make_mae_oracle(seed=0)


def test_mae_agrees_with_what_its_gradients_one_by_one_give(mae_arrays, monkeypatch):
  # That strategies agree is shown in tests/privacy.
  monkeypatch.setattr(check_oracle, 'CLIPPING_STRATEGIES', ['vmap'])
  errors = check_oracle.oracle_errors(check_oracle.Oracle(mae_arrays))
  assert list(errors) == [
    'loss',
    'encoder',
    'prediction',
    'block_means',
    'grad_norm',
    'clipped_sum',
  ]
  flat = errors | errors.pop('clipped_sum')
  assert all(0 <= error <= TOLERANCE for error in flat.values()), flat


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'in/mask_noise': np.zeros((4, 8), np.float32)}, 'in/mask_noise is float32 of shape (4, 8)'),
    ({'in/mask_noise': np.zeros((4, 9), int)}, 'in/mask_noise is int64'),
    ({'out/all/clip_norm': np.array(0.0)}, 'out/all/clip_norm=0.0'),
    ({'param/pos_embed': np.zeros((1, 11, 12), np.float32)}, "'pos_embed' has 11 tokens"),
    ({'param/mask_token': np.zeros((1, 8), np.float32)}, "'mask_token' has shape (1, 8)"),
    ({'param/blocks.1.norm1.bias': np.zeros(12)}, "unknown array 'blocks.1.norm1.bias'"),
  ],
)
def test_what_is_wrong_in_a_file_of_an_mae_is_named(mae_arrays, changes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    check_oracle.oracle_errors(check_oracle.Oracle(mae_arrays | changes))


def test_shipped_file_is_what_make_oracle_writes():
  with jax.enable_x64(True):
    made = make_oracle.make_oracle(seed=0)
  shipped = check_oracle.read_oracle(str(SHIPPED))
  assert made.keys() == shipped.keys()
  for key, array in made.items():
    if key == 'meta':
      assert array == shipped[key]
    else:
      assert array.dtype == shipped[key].dtype
      np.testing.assert_allclose(array, shipped[key], rtol=1e-4, atol=1e-6, err_msg=key)
  norms, clip_norm = shipped['out/grad_norm'], shipped['out/clip_norm']
  assert norms.min() < clip_norm < norms.max()


def test_prints_one_json_line(monkeypatch, capsys):
  errors = {'loss': 1e-7, 'clipped_sum': {'vmap': 2e-7}}
  monkeypatch.setattr(check_oracle, 'oracle_errors', lambda oracle: errors)
  assert check_oracle.main([str(SHIPPED)]) == 0
  assert json.loads(capsys.readouterr().out) == errors


def write(path, **changes):
  """The shipped file with arrays replaced, or removed where None."""
  arrays = dict(check_oracle.read_oracle(str(SHIPPED))) | changes
  np.savez(path, **{key: x for key, x in arrays.items() if x is not None})


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'meta': None}, "key 'meta' is missing"),
    ({'meta': np.array('{"width": 12}')}, "meta has no 'vocab_size'"),
    ({'meta': np.array('no JSON')}, 'meta must be JSON'),
    ({'meta': np.array('[1]')}, 'meta must be JSON'),
    ({'param/norm.bias': None}, "'norm.bias' is missing"),
    ({'in/images': np.zeros((4, 12, 12, 3))}, 'in/images has shape (4, 12, 12, 3)'),
    ({'in/tokens': np.zeros((3, 7), int)}, 'in/tokens is int64 of shape (3, 7)'),
    ({'out/clip_norm': np.array(0.0)}, 'out/clip_norm=0.0'),
  ],
)
def test_a_bad_file_is_one_line_and_status_2(tmp_path, capsys, changes, message):
  write(tmp_path / 'bad.npz', **changes)
  assert check_oracle.main([str(tmp_path / 'bad.npz')]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error and error.count('\n') == 1


@pytest.mark.parametrize('content', [None, b'', b'not an archive', b'PK\x03\x04broken'])
def test_an_unreadable_file_is_one_line_and_status_2(tmp_path, capsys, content):
  path = tmp_path / 'bad.npz'
  if content is not None:
    path.write_bytes(content)
  assert check_oracle.main([str(path)]) == 2
  error = capsys.readouterr().err
  assert str(path) in error and error.count('\n') == 1


def test_errors_are_relative_to_the_largest_reference_value():
  reference = np.array([1.0, -4.0])
  assert check_oracle.relative_error(np.array([1.0, -3.0]), reference) == 0.25
  references = {'a': reference, 'b': np.array([0.01])}
  values = {'a': reference, 'b': np.array([0.011])}
  assert check_oracle.worst_error(values, references) == pytest.approx(0.1)
  assert np.isnan(check_oracle.worst_error(values | {'b': np.array([np.nan])}, references))
