"""Metrics are appended, and lines that will be replayed go."""

import json
import os
import stat

import pytest

from dpcap.training import metrics


def test_lines_past_the_checkpoint_are_dropped_on_resume(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 'm.jsonl', 0)
  for step in range(1, 5):
    writer.write(step, {'x': step / 2, 'name': 'text', 'none': None})
  writer.close()
  with (tmp_path / 'm.jsonl').open('a') as f:
    f.write('{"step": 5, "x')  # cut off by a crash
  writer = metrics.MetricWriter(tmp_path, 'm.jsonl', 3)
  writer.write(4, {'x': 9.0})
  writer.close()
  lines = metrics.read_jsonl(tmp_path / 'm.jsonl')
  assert [line['step'] for line in lines] == [1, 2, 3, 4]
  assert lines[-1] == {'step': 4, 'x': 9.0}


def test_tensorboard_events_of_diagnostics_say_private_in_their_name(tmp_path):
  metrics.MetricWriter(tmp_path, metrics.METRICS, 0).close()
  metrics.MetricWriter(tmp_path, metrics.DIAGNOSTICS, 0).close()
  names = [path.name for path in (tmp_path / 'tensorboard').iterdir()]
  assert len(names) == 2 and sum(name.endswith('.private') for name in names) == 1
  assert 'private' in metrics.DIAGNOSTICS


def _mode(path):
  return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize('name, mode', [(metrics.METRICS, 0o644), (metrics.DIAGNOSTICS, 0o600)])
def test_private_files_are_made_for_the_owner_only(tmp_path, monkeypatch, name, mode):
  """Also for a moment: TensorBoard opens its own file, under a umask that lets nobody in."""
  masks, real = [], metrics.SummaryWriter

  def writer(*args, **kwargs):
    masks.append(os.umask(0))
    os.umask(masks[-1])
    return real(*args, **kwargs)

  monkeypatch.setattr(metrics, 'SummaryWriter', writer)
  before = os.umask(0o022)
  try:
    for resume_step in (0, 1):
      opened = metrics.MetricWriter(tmp_path, name, resume_step)
      opened.write(1 + resume_step, {'x': 1.0})
      opened.close()
      paths = [tmp_path / name, *(tmp_path / 'tensorboard').iterdir()]
      assert {_mode(path) for path in paths} == {mode}
      for path in paths:
        path.chmod(0o666 & ~0o022)  # as an older version left them
    assert os.umask(0o022) == 0o022
  finally:
    os.umask(before)
  assert masks == [0o077 if mode == 0o600 else 0o022] * 2


def test_numbers_that_are_none_are_null(tmp_path):
  path = tmp_path / 'm.jsonl'
  path.write_text('{"step": 1, "x": NaN, "y": 2.0}\n')  # of an older version
  writer = metrics.MetricWriter(tmp_path, 'm.jsonl', 1)
  writer.write(2, {'x': float('nan'), 'y': float('-inf'), 'z': 3})
  writer.close()

  def refuse(name):
    raise AssertionError(name)

  lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
  assert lines == [{'step': 1, 'x': None, 'y': 2.0}, {'step': 2, 'x': None, 'y': None, 'z': 3}]
