"""Wrong command lines end in one clear line and status 2, without a stack trace."""

import json

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
    (['--config=configs/dpcap_less_data.py:2percent'], ["'2percent'", '10percent, 1percent']),
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
