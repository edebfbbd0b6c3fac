"""Checkpoints come back as they were, whole or not at all."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.step import TrainState


def _state(step, size=3):
  w = jnp.arange(size, dtype=jnp.float32) + step
  return TrainState(jnp.int32(step), {'w': w}, {'f': w * 2}, ({'m': w * 3}, ()))


def test_round_trip_and_statement(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'c')
  assert checkpoints.latest_step() is None
  checkpoints.save(_state(4), {'epsilon': {'pld': 1.5}})
  checkpoints.wait()
  assert checkpoints.latest_step() == 4
  restored = checkpoints.restore(4, _state(0))
  jax.tree.map(np.testing.assert_array_equal, restored, _state(4))
  model = checkpoints.restore_model(4, _state(0))
  np.testing.assert_array_equal(model['params']['w'], _state(4).params['w'])
  assert '1.5' in (tmp_path / 'c/4/privacy/metadata').read_text()
  checkpoints.close()


def test_keeps_the_latest(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in range(1, 5):
    checkpoints.save(_state(step), {})
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['3', '4']


def test_unfinished_checkpoint_is_never_picked_up(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(_state(2), {})
  checkpoints.close()
  torn = tmp_path / '5.orbax-checkpoint-tmp-123'
  (torn / 'model').mkdir(parents=True)
  again = Checkpoints(tmp_path)
  assert again.latest_step() == 2
  again.close()


def test_reading_leaves_alone_what_a_run_is_writing(tmp_path):
  writer = Checkpoints(tmp_path)
  writer.save(_state(2), {})
  writer.close()
  writing = tmp_path / '9.orbax-checkpoint-tmp'
  writing.mkdir()
  reader = Checkpoints(tmp_path, read_only=True)
  assert reader.latest_step() == 2
  reader.restore_model(2, _state(0))
  reader.close()
  assert writing.exists()


def test_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(_state(1), {})
  checkpoints.wait()
  with pytest.raises(UserError, match=f'{tmp_path}/1: cannot be restored') as e:
    checkpoints.restore(1, _state(0, size=4))
  assert '\n' not in str(e.value)
  with pytest.raises(UserError):
    checkpoints.restore_model(1, _state(0)._replace(params={'other': jnp.zeros(3)}))
  checkpoints.close()


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  usage = shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr('shutil.disk_usage', lambda _: usage)
  with pytest.raises(UserError, match=f'{tmp_path}: the disk is full'):
    checkpoints.save(_state(1), {})
  assert not list(tmp_path.iterdir())
  checkpoints.close()


def test_directory_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot hold checkpoints'):
    Checkpoints(tmp_path / 'file' / 'c')
