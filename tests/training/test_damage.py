"""Checkpoints that are not whole are told from others, and set aside."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest

from dpcap.errors import UserError
from dpcap.training import damage, evaluation
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.step import TrainState
from tests import checkpoint_files


def _state(step, size=3000):
  w = jnp.arange(size, dtype=jnp.float32) + step
  return TrainState(jnp.int32(step), {'w': w}, {'f': w * 2}, ({'m': w * 3}, ()))


@pytest.fixture(name='written', scope='module')
def _written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run') / 'checkpoints'
  checkpoints = Checkpoints(directory)
  for step in (2, 4, 6):
    checkpoints.save(_state(step), {})
  checkpoints.close()
  return directory


@pytest.fixture(name='directory')
def _directory(written, tmp_path):
  return pathlib.Path(shutil.copytree(written, tmp_path / 'checkpoints'))


def cut_largest(checkpoint):
  """Halves the file of a checkpoint that holds most of its arrays."""
  path = max(checkpoint.rglob('d/*'), key=lambda file: file.stat().st_size)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(checkpoint):
  shutil.rmtree(checkpoint)
  checkpoint.mkdir()


_DAMAGES = {
  '_CHECKPOINT_METADATA, privacy/metadata missing and more': _empty,
  'training/_METADATA, training/manifest.ocdbt missing': lambda step: shutil.rmtree(
    step / 'training'
  ),
  'privacy/metadata cannot be read': lambda step: (step / 'privacy/metadata').write_text('{"st'),
  'privacy/metadata is no JSON object': lambda step: (step / 'privacy/metadata').write_text('3'),
  'an array cannot be read: ': cut_largest,
  'model: an array cannot be read: ': lambda step: shutil.rmtree(step / 'model/ocdbt.process_0'),
}


@pytest.mark.parametrize('words', _DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_the_newest(directory, words):
  _DAMAGES[words](directory / '6')
  (directory / '6.damaged').mkdir()  # of an earlier time
  said = damage.set_aside(directory)
  assert said[0].startswith(f'{directory}/6: not whole (') and words in said[0]
  assert said[0].endswith('set aside as 6.damaged1')
  assert said[1] == f'{directory}: whole checkpoints: 2, 4'
  checkpoints = Checkpoints(directory)
  assert checkpoints.latest_step() == 4
  # And the step can be written again.
  checkpoints.save(_state(6), {})
  checkpoints.close()
  assert damage.damage_of_arrays(directory / '6') is None
  assert damage.set_aside(directory) == []


def test_whole_checkpoints_are_left_alone(directory):
  assert damage.set_aside(directory) == [] == damage.set_aside(directory / 'absent')
  assert [path.name for path in damage.steps(directory)] == ['6', '4', '2']


def test_who_reads_a_damaged_one_is_told_what_is_wrong_with_it_and_what_is_there(directory):
  cut_largest(directory / '4')
  checkpoints = Checkpoints(directory, read_only=True)
  with pytest.raises(UserError, match='/4: not whole .*an array.*; whole ones beside it: 2, 6$'):
    checkpoints.restore(4, _state(0))
  with pytest.raises(UserError, match='/6: cannot be restored as the model of this config'):
    checkpoints.restore(6, _state(0, size=7))
  checkpoints.close()


def test_an_evaluation_looks_again_where_a_run_took_its_checkpoint_away(tmp_path):
  """A run with train.keep_checkpoints=1 goes on beside it."""

  class Evaluations:
    def restore(self, checkpoint):
      if checkpoint.name == '2':
        shutil.rmtree(checkpoint)
        checkpoint_files.write(tmp_path / 'checkpoints/4', {})
        raise UserError('no such file')
      return {'params': checkpoint.name}

  checkpoint_files.write(tmp_path / 'checkpoints/2', {})
  checkpoint, variables = evaluation.restore(Evaluations(), None, tmp_path)
  assert checkpoint == tmp_path / 'checkpoints/4' and variables == {'params': '4'}
  checkpoint_files.write(tmp_path / 'checkpoints/2', {})
  with pytest.raises(UserError, match='holds no checkpoint'):
    evaluation.restore(Evaluations(), str(tmp_path / 'checkpoints/2'), tmp_path)
