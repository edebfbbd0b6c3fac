"""What the benchmark of a start refuses; what it measures is looked at in test_compilation_cache."""

import pytest

from tools import bench_start


@pytest.mark.parametrize('argument', ['--rounds=0', '--rounds=two', '--fast', '--workdir=x'])
def test_a_wrong_option_is_refused_by_name(argument, capsys):
  assert bench_start.main(['--config=tests/tiny.py', argument]) == 2
  assert argument.split('=')[0] in capsys.readouterr().err


def test_a_run_that_fails_is_told_of(capsys):
  assert bench_start.main(['--config=tests/tiny.py', '--config.train.steps=0']) == 2
  assert 'ended with status 2' in capsys.readouterr().err
