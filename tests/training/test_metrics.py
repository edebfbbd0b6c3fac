"""Metrics are appended, and lines that will be replayed go."""

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
  metrics.MetricWriter(tmp_path, metrics.DIAGNOSTICS, 0, suffix='.private').close()
  names = [path.name for path in (tmp_path / 'tensorboard').iterdir()]
  assert len(names) == 2 and sum(name.endswith('.private') for name in names) == 1
  assert 'private' in metrics.DIAGNOSTICS
