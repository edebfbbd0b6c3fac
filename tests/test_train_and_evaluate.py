"""The main programs end to end: tar shards with damaged records, trained and probed."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from dpcap import data

_CLASSES = ('1', '2', '3', '4')


def _jpeg(array, mode='RGB'):
  file = io.BytesIO()
  Image.fromarray(array).convert(mode).save(file, 'JPEG')
  return file.getvalue()


def _write_shard(path, split, size):
  """Scenes as JPEG in img2dataset's layout, some of them damaged one way or another."""
  scenes = data.Scenes(split=split, size=size, image_size=24, label='count')
  damage = {
    3: {'jpg': b'not an image'},
    5: {'txt': None},
    7: {'txt': b''},
    9: {'txt': b'\xff\xfe\x00'},
    11: {'txt': b'word ' * 2000},
    13: {'jpg': _jpeg(np.full((1, 1, 3), 9, np.uint8))},
    15: {'jpg': _jpeg(np.full((20, 20, 3), 99, np.uint8), 'CMYK')},
    17: {'jpg': None},
  }
  with tarfile.open(path, 'w') as tar:
    for i in range(size):
      record = scenes[i]
      members = {
        'jpg': _jpeg(record['image']),
        'txt': record['caption'].encode(),
        'json': json.dumps({'label': _CLASSES[record['label']]}).encode(),
      } | (damage.get(i, {}) if split == 'train' else {})
      for extension, content in members.items():
        if content is not None:
          info = tarfile.TarInfo(f'{i:05d}.{extension}')
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))


@pytest.fixture(name='run', scope='module')
def _run(program, tmp_path_factory):
  folder = tmp_path_factory.mktemp('shards')
  _write_shard(folder / 'train-0.tar', 'train', 60)
  _write_shard(folder / 'test-0.tar', 'test', 40)
  workdir = folder / 'run'
  arguments = (
    f'--config=configs/emoji.py:{folder}',
    f'--workdir={workdir}',
    '--config.model.size=micro',
    '--config.data.text_length=16',
    '--config.data.workers=1',
    '--config.train.steps=3',
    '--config.optimizer.warmup_steps=1',
    '--config.privacy.epsilon=0.5',  # takes a fifth of the time to calibrate that 8 does
    '--config.privacy.expected_batch_size=50',
    '--config.mesh.physical_batch=8',
    '--config.train.log_every=1',
  )
  process = program('dpcap.train', *arguments)
  output, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  return folder, workdir, arguments, errors


def test_bad_records_are_survived_counted_and_told(run):
  _, workdir, _, errors = run
  assert 'N 59 ' in errors and ('epsilon 0.5' in errors or 'epsilon 0.499' in errors)
  assert 'drawn records cannot be used and contribute zero' in errors
  assert 'Traceback' not in errors
  lines = [
    json.loads(line) for line in (workdir / 'diagnostics.private.jsonl').read_text().splitlines()
  ]
  # The one without an image is none. Four of the other damaged records are unusable; with
  # q = 5/6 nearly all are drawn.
  assert 4 < sum(line['bad_records'] for line in lines) <= 12
  assert 'bad_records' not in (workdir / 'metrics.jsonl').read_text()
  assert json.loads((workdir / 'privacy.json').read_text())['dataset_size'] == 59


def test_evaluate_writes_the_contract_and_prints_a_table(run, program):
  _, workdir, arguments, _ = run
  # As a run leaves it that was killed between its checkpoint and the statement.
  statement = (workdir / 'privacy.json').read_text()
  (workdir / 'privacy.json').write_text('{"steps": 2}')
  process = program('dpcap.evaluate', *arguments)
  output, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  assert (workdir / 'privacy.json').read_text() == statement
  # Features are as private as the images.
  assert (workdir / 'evals/cache').stat().st_mode & 0o777 == 0o700
  for name in ('private_features', 'untrained_encoder', 'raw_pixels'):
    record = json.loads((workdir / f'evals/{name}.json').read_text())
    assert record['name'] == name and record['metric'] == 'top1' and record['n'] == 40
    assert record['checkpoint'] == str(workdir / 'checkpoints/3')
    assert record['interval95'][0] <= record['value'] <= record['interval95'][1]
    assert record['uses_training_data'] is True  # the probe's train source
    assert name in output and f'{100 * record["value"]:.1f}%' in output
  captions = json.loads((workdir / 'evals/captions.json').read_text())
  assert captions['n'] == 24 and captions['uses_training_data'] is False


def test_evaluating_as_another_model_is_refused(run, program):
  folder, workdir, arguments, _ = run
  other = [a for a in arguments if 'model.size' not in a] + ['--config.model.size=demo']
  process = program('dpcap.evaluate', *other)
  _, errors = process.communicate(timeout=120)
  lines = [line for line in errors.splitlines() if line.startswith('error: ')]
  assert process.returncode == 2 and len(lines) == 1 and 'cannot be restored' in lines[0], errors
  assert 'Traceback' not in errors


def test_missing_shards_are_refused(run, program):
  folder, workdir, arguments, _ = run
  process = program(
    'dpcap.train', f'--config=configs/emoji.py:{folder}/nowhere', f'--workdir={workdir}2'
  )
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2
  assert errors.startswith('error: ') and 'nowhere' in errors and errors.count('\n') == 1
