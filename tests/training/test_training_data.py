"""What a result says of the training data: those of the checkpoint's own run, or unknown."""

import json
import pathlib
import shutil
import types

import pytest
from PIL import Image

from dpcap import data, privacy
from dpcap.data import contents
from dpcap.training.training_data import TrainingData


def scenes(split, size):
  return data.Scenes(split=split, size=size, image_size=16)


def folder(root, numbers):
  """An image folder; `numbers` are what tells images apart."""
  for number in numbers:
    path = root / f'all/class/{number}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (number, 0, 0)).save(path)
  return data.ImageFolder(str(root), 'all')


def write_run(workdir, source, trained_on, **statement):
  """A workdir with the files that tell what it was trained on; returns its checkpoint."""
  checkpoint = workdir / 'checkpoints/10'
  (checkpoint / 'privacy').mkdir(parents=True)
  config = {'data': {'image_size': 16, 'source': source}}
  (workdir / 'config.json').write_text(json.dumps(config))
  statement = {'dataset_size': trained_on} | statement
  (checkpoint / 'privacy/metadata').write_text(json.dumps(statement))
  return checkpoint


@pytest.fixture(name='on_scenes')
def _on_scenes(tmp_path):
  return write_run(tmp_path / 'run', {'name': 'scenes', 'split': 'train', 'size': 400}, 400)


@pytest.fixture(name='on_files')
def _on_files(tmp_path):
  """A run on images 0 to 4."""
  folder(tmp_path / 'images', range(5))
  source = {'name': 'image_folder', 'path': str(tmp_path / 'images'), 'split': 'all'}
  return write_run(tmp_path / 'run', source, 5)


def judge(checkpoint, *sources, apart=None):
  verdict = TrainingData(str(checkpoint)).judge(sources, apart)
  assert verdict.why
  return verdict.uses_training_data, verdict.declared


def test_all_that_was_read_must_be_apart(on_scenes, tmp_path):
  other, own = scenes('test', 9), scenes('train', 300)
  assert judge(on_scenes, other) == (False, False)
  assert judge(on_scenes, other, scenes('validation', 9)) == (False, False)
  assert judge(on_scenes, folder(tmp_path / 'x', [1])) == (False, False)
  for sources in ((own,), (own, other), (other, own)):
    assert judge(on_scenes, *sources) == (True, False)


def test_what_nobody_knows_is_private(on_scenes):
  assert judge(on_scenes) == (True, False)
  assert judge(on_scenes, apart=True) == (False, True)


def test_files_are_looked_at(on_files, tmp_path):
  assert judge(on_files, folder(tmp_path / 'x', [7, 8])) == (False, False)
  assert judge(on_files, folder(tmp_path / 'x', [7, 8, 4])) == (True, False)
  assert judge(on_files, scenes('train', 9)) == (False, False)


def tar_like():
  """A source of another kind of files."""
  files = contents.ImageFiles('tar_shards', 'x', frozenset(), [], 0)
  return types.SimpleNamespace(fingerprint='x', contents=files)


def test_a_declaration_holds_where_records_do_not_tell(on_files, tmp_path):
  own, other = folder(tmp_path / 'x', [4]), folder(tmp_path / 'y', [9])
  assert judge(on_files, tar_like()) == (True, False)
  assert judge(on_files, tar_like(), apart=True) == (False, True)
  assert judge(on_files, tar_like(), other, apart=True) == (False, True)
  # Against what is seen it does not.
  assert judge(on_files, own, apart=True) == (True, False)
  assert judge(on_files, tar_like(), own, apart=True) == (True, False)
  assert judge(on_files, other, apart=True) == (False, False)
  assert judge(on_files, other, apart=False) == (True, True)


@pytest.mark.parametrize(
  'damage',
  [
    lambda run: (run / 'config.json').unlink(),
    lambda run: (run / 'config.json').write_text('{'),
    lambda run: (run / 'config.json').write_text('[]'),
    lambda run: (run / 'config.json').write_text('{"data": {"source": {}}}'),
    lambda run: shutil.rmtree(run.parent / 'images'),
    lambda run: (run.parent / 'images/all/class/4.png').unlink(),
    lambda run: (run / 'checkpoints/10/privacy/metadata').unlink(),
    lambda run: (run / 'checkpoints/10/privacy/metadata').write_text('{"dataset_size": 6}'),
  ],
)
def test_training_data_that_cannot_be_seen_are_not_known_to_be_apart(on_files, tmp_path, damage):
  source = folder(tmp_path / 'x', [4])
  damage(tmp_path / 'run')
  assert judge(on_files, source) == (True, False)
  assert judge(on_files, folder(tmp_path / 'y', [9])) == (True, False)
  assert judge(on_files, folder(tmp_path / 'y', [9]), apart=True) == (False, True)


def test_keys_of_another_version_are_survived(on_files, tmp_path):
  config = json.loads((tmp_path / 'run/config.json').read_text())
  config['data']['source']['new_key'] = 1
  (tmp_path / 'run/config.json').write_text(json.dumps(config))
  assert judge(on_files, folder(tmp_path / 'y', [9])) == (True, False)


def test_scenes_are_told_from_a_config_alone(on_files, tmp_path):
  shutil.rmtree(tmp_path / 'images')
  assert judge(on_files, scenes('train', 9)) == (False, False)
  (tmp_path / 'run/config.json').unlink()
  assert judge(on_files, scenes('test', 9)) == (True, False)


def test_the_run_is_the_one_that_made_the_checkpoint(on_scenes, tmp_path, monkeypatch):
  """Not where a link to it lies."""
  other = {'name': 'scenes', 'split': 'test', 'size': 400}
  elsewhere = write_run(tmp_path / 'elsewhere', other, 400)
  (elsewhere.parent / '11').symlink_to(on_scenes)
  assert judge(elsewhere, scenes('train', 9)) == (False, False)
  assert judge(elsewhere.parent / '11', scenes('train', 9)) == (True, False)
  monkeypatch.chdir(tmp_path)
  assert judge(pathlib.Path('run/checkpoints/10'), scenes('train', 9)) == (True, False)
  assert judge(pathlib.Path('nowhere'), scenes('test', 9)) == (True, False)


def test_a_run_of_another_size_is_not_the_one_that_made_the_checkpoint(on_scenes, tmp_path):
  copy = tmp_path / 'other/checkpoints/10'
  write_run(tmp_path / 'other', {'name': 'scenes', 'split': 'test', 'size': 500}, 400)
  assert judge(copy, scenes('train', 9)) == (True, False)


def test_training_data_are_opened_once_and_only_if_need_be(on_files, tmp_path, monkeypatch):
  opened, make_source = [], data.make_source
  monkeypatch.setattr(
    data, 'make_source', lambda **options: opened.append(options) or make_source(**options)
  )
  training_data = TrainingData(str(on_files))
  training_data.judge([scenes('test', 9), tar_like()], None)
  assert not opened
  for numbers in ([8], [9], [8]):
    root = tmp_path / f'x{numbers[0]}'
    assert not training_data.judge([folder(root, numbers)], None).uses_training_data
  assert len(opened) == 1


def start(checkpoint, **statement):
  """What a statement says of a run that started from there."""
  carried = json.loads((checkpoint / 'privacy/metadata').read_text()) | statement
  return privacy.make_start(str(checkpoint), ('all',), carried)


SCENES = {'name': 'scenes', 'split': 'train', 'size': 400}
GUARANTEE = {'private': True, 'epsilon': {'pld': 1.0}, 'delta': 1e-5}


def test_the_data_of_the_start_count_as_well(on_files, tmp_path):
  """However many runs lie between, and whether or not they had a guarantee."""
  for number, statement in enumerate((GUARANTEE, {'private': False})):
    init = start(on_files, **statement)
    second = write_run(tmp_path / f'second{number}', SCENES, 400, init=init, **GUARANTEE)
    third = write_run(tmp_path / f'third{number}', SCENES, 400, init=start(second), **GUARANTEE)
    for checkpoint in (second, third):
      assert judge(checkpoint, folder(tmp_path / 'x', [4])) == (True, False)
      assert judge(checkpoint, folder(tmp_path / 'y', [9])) == (False, False)
      assert judge(checkpoint, scenes('train', 9)) == (True, False)
      assert judge(checkpoint, scenes('test', 9)) == (False, False)
  shutil.rmtree(tmp_path / 'run')
  assert judge(third, folder(tmp_path / 'y', [9])) == (True, False)
  assert judge(third, folder(tmp_path / 'y', [9]), apart=True) == (False, True)


def test_weights_from_elsewhere_may_have_seen_anything(tmp_path):
  foreign = privacy.foreign_statement('base.pth', 'ab', None)
  init = privacy.make_start(str(tmp_path / 'base.pth'), ('all',), foreign)
  run = write_run(tmp_path / 'run', SCENES, 400, init=init)
  assert judge(run, folder(tmp_path / 'y', [9])) == (True, False)
  assert judge(run, folder(tmp_path / 'y', [9]), apart=True) == (False, True)


def test_weights_from_elsewhere_in_a_workdir_are_not_of_its_run(on_scenes, tmp_path):
  """A file may lie anywhere, and its folder's config tells nothing of it."""
  foreign = privacy.foreign_statement('base.pth', 'ab', None)
  init = privacy.make_start(str(on_scenes.parent / 'base.pth'), ('all',), foreign)
  run = write_run(tmp_path / 'second', SCENES, 400, init=init)
  assert judge(run, folder(tmp_path / 'y', [9])) == (True, False)
  assert judge(run, folder(tmp_path / 'y', [9]), apart=True) == (False, True)


def test_a_run_that_is_another_by_now_tells_nothing(on_files, tmp_path):
  """A path may be used again; the statement names the kind of data."""
  of_files = {'source': 'image_folder', 'generated': False}
  init = start(on_files, data=of_files, **GUARANTEE)
  run = write_run(tmp_path / 'second', SCENES, 400, init=init, **GUARANTEE)
  assert judge(run, folder(tmp_path / 'y', [9])) == (False, False)
  shutil.rmtree(tmp_path / 'run')
  write_run(tmp_path / 'run', SCENES, 400)
  assert judge(run, folder(tmp_path / 'y', [9])) == (True, False)


def test_a_statement_that_is_gone_may_have_named_a_start(on_scenes, tmp_path):
  (on_scenes / 'privacy/metadata').unlink()
  assert judge(on_scenes, folder(tmp_path / 'y', [9])) == (True, False)


def test_a_start_of_generated_data_alone_is_nobodys(on_files, tmp_path):
  """Whether or not its run is still there."""
  data_of = {'source': 'textures', 'generated': True}
  first = write_run(tmp_path / 'first', {'name': 'textures'}, 9, private=False, data=data_of)
  init = start(first)
  shutil.rmtree(tmp_path / 'first')
  files = {'name': 'image_folder', 'path': str(tmp_path / 'images'), 'split': 'all'}
  run = write_run(tmp_path / 'second', files, 5, init=init)
  assert judge(run, folder(tmp_path / 'y', [9])) == (False, False)
  assert judge(run, folder(tmp_path / 'x', [4])) == (True, False)
