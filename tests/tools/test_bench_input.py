"""The benchmark of the input pipeline runs and says what it should; no time is asserted."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tools import bench_input
from tools.bench_parts import photos

# The pipeline's own line comes last, after the loop that it is compared with.
_PIPELINE = ['bare loop', 'pipeline']


def run(capsys, *arguments):
  status = bench_input.main(list(arguments))
  out, errors = capsys.readouterr()
  return status, [json.loads(line) for line in out.splitlines()], errors


def test_every_part_has_its_lines(capsys):
  status, lines, table = run(capsys, '--images=8', '--workers=1', '--rounds=2')
  assert status == 0
  kinds = {what: [x for x in lines if x['what'] == what] for what in {x['what'] for x in lines}}
  assert {what: len(found) for what, found in kinds.items()} == {
    'draw': 1,
    'reading': 6,
    'stage': 6,
    'pipeline': 2,
  }
  assert [line['case'] for line in kinds['pipeline']] == _PIPELINE
  assert all(line['images'] == 8 and line['images_per_s'] > 0 for line in kinds['pipeline'])
  for what in ('reading', 'stage', 'pipeline'):
    assert kinds[what][0]['ratio'] == 1 and len(kinds[what][1]['quartiles']) == 2
  assert 'index, shuffled, dropped' in table


def test_made_up_photos_are_of_web_size():
  sizes = [photos.make_jpeg(np.random.default_rng(i)) for i in range(6)]
  assert all(15_000 < len(jpeg) < 200_000 for jpeg in sizes)
  assert all(300 <= side <= 800 for jpeg in sizes for side in Image.open(io.BytesIO(jpeg)).size)


@pytest.mark.parametrize(
  'options, reason',
  [(['--rounds=0'], "'0' must be"), (['--color'], '--color'), (['/nowhere'], '/nowhere')],
)
def test_wrong_options_are_told_in_one_line(capsys, options, reason):
  status, lines, errors = run(capsys, *options)
  assert status == 2 and not lines and errors.startswith('error: ') and reason in errors
  assert errors.count('\n') == 1
