"""Wrong command lines end in one clear line and status 2, without a stack trace."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(name='refused', scope='module')
def _refused(program):
  def run(*arguments, module='tools.privacy'):
    process = program(module, *arguments)
    output, errors = process.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if line.strip()]
    assert process.returncode == 2 and not output, errors
    assert len(lines) == 1 and lines[0].startswith('error: '), errors
    return lines[0]

  return run


_TINY = '--config=tests/tiny.py'


@pytest.mark.parametrize(
  'arguments,parts',
  [
    ([], ['--config']),
    (['--config=configs/none.py'], ['configs/none.py', 'No such file']),
    (['--config=configs/dpcap.py:2percent'], ["'2percent'", '100percent, 10percent, 1percent']),
    ([_TINY, '--config.privacy.epsilom=3'], ['privacy.epsilom', 'did you mean epsilon']),
    ([_TINY, '--config.privacy.foo=None'], ['privacy.foo', 'no key']),
    ([_TINY, '--config.privacy.delta=much'], ['privacy.delta', 'much', 'float']),
    ([_TINY, '--config.train.steps=None'], ['train.steps is None', 'int']),
    ([_TINY, '--config.privacy.expected_batch_size=401'], ['401', '400']),
    ([_TINY, '--unknown=1'], ['unknown']),
    ([_TINY, 'stray'], ['stray']),
  ],
)
def test_refused(refused, arguments, parts):
  line = refused(*arguments)
  for part in parts:
    assert part in line


def test_main_programs_need_a_workdir(refused):
  assert '--workdir' in refused(_TINY, module='dpcap.train')
  assert 'holds no checkpoint' in refused(
    '--config=configs/demo.py', '--workdir=/nonexistent', module='dpcap.evaluate'
  )


def test_none_can_be_given_on_the_command_line(program):
  process = program(
    'tools.privacy',
    _TINY,
    '--config.privacy.noise_multiplier=None',
    '--config.privacy.epsilon=3',
    '--config.privacy.accountant=rdp',
  )
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert 2.99 < json.loads(output)['epsilon_rdp'] <= 3


def test_of_values_of_a_key_the_last_one_counts(program):
  key = '--config.privacy.'
  process = program(
    'tools.privacy',
    _TINY,
    *(f'{key}noise_multiplier={value}' for value in ('None', 'None', '3', '5')),
    *(f'{key}epsilon={value}' for value in ('3', 'None')),
    *(f'{key}delta=None', f'{key}delta', '1e-3'),
    '--config.data.dataset_size=None',
    '--config.data.dataset_size=500',
    '--config.data.dataset_size=None',
    f'{key}accountant=rdp',
  )
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  found = json.loads(output)
  assert (found['noise_multiplier'], found['delta'], found['dataset_size']) == (5, 1e-3, 400)


def test_a_simulation_s_figures_stand_beside_those_of_the_run_that_it_simulates(program):
  arguments = (_TINY, '--config.privacy.simulation_divisor=5')
  output, errors = program('tools.privacy', *arguments).communicate(timeout=60)
  found = json.loads(output)
  assert found['epsilon_rdp'] is None and found['epsilon_pld'] is None, errors
  assert (found['expected_batch_size'], found['noise_multiplier']) == (4, 0.8)
  run = found['simulates']
  assert 0 < run['epsilon_pld'] < run['epsilon_rdp'] and run['expected_batch_size'] == 20
  assert set(run) == set(found) - {'simulates'}


_CONFIG_FILES = {
  "def f():\n  return {}['x']\n\ndef get_config():\n  return f()\n": ":2: KeyError: 'x'",
  'def get_config():\n  raise TypeError("no")\n': ':2: TypeError: no',
  'import absent_module\n': ":1: ModuleNotFoundError: No module named 'absent_module'",
  'def get_config(:\n': ':1: invalid syntax',
  'def config():\n  pass\n': ': has no function get_config',
  'def get_config():\n  return {}\n': ': get_config returns dict; it must return the ConfigDict',
  'def get_config():\n  pass\n': ': get_config returns NoneType; it must',
}

# Imports once, then a process for each file.
_READ_ALL = """
import os, sys
from dpcap import command_line
holder = command_line.define_config()
files = sys.argv[1:]
for file in files:
  if not os.fork():
    sys.argv = ['program', f'--config={file}']
    command_line.run(lambda: command_line.load_config(holder))
  assert os.waitstatus_to_exitcode(os.wait()[1]) == 2
"""


def test_what_is_wrong_with_a_config_file_is_said_with_its_line(tmp_path):
  paths = [tmp_path / f'{i}.py' for i in range(len(_CONFIG_FILES))]
  for path, text in zip(paths, _CONFIG_FILES):
    path.write_text(text)
  run = subprocess.run(
    [sys.executable, '-c', _READ_ALL, *map(str, paths)], capture_output=True, text=True, timeout=60
  )
  assert run.returncode == 0, run.stderr
  lines = run.stderr.splitlines()
  assert len(lines) == len(paths)
  for line, path, words in zip(lines, paths, _CONFIG_FILES.values()):
    assert line.startswith(f'error: {path}{words}')
