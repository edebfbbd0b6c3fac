"""The benchmark of zero-shot classification says what it should; no time is asserted."""

import json

import pytest

from tools import bench_zero_shot


def test_a_line_for_each_method(capsys):
  small = ['--size=micro', '--image_size=16', '--labels=3', '--images=1', '--rounds=2']
  assert bench_zero_shot.main([*small, '--reference_labels=2']) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line['method'] for line in lines] == ['reference', 'cached']
  assert lines[0]['ratio'] == 1 and all(line['images_per_s'] > 0 for line in lines)
  assert lines[1]['labels'] == 3 and len(lines[1]['range']) == 2


@pytest.mark.parametrize('option', ['--labels=0', '--reference_labels=2000', '--size=huge'])
def test_wrong_options_are_refused(option, capsys):
  assert bench_zero_shot.main([option]) == 2
  said = capsys.readouterr().err
  assert option.split('=')[0] in said and said.count('\n') == 1
