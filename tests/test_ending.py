"""Programs that are interrupted, or whose reader went away, end without a stack trace."""

import pathlib
import subprocess
import sys

import pytest

_REPOSITORY = pathlib.Path(__file__).parents[1]


def _run(script):
  """Runs a script whose output nobody reads."""
  process = subprocess.Popen(
    [sys.executable, '-c', f'import dpcap.ending\n{script}'],
    cwd=_REPOSITORY,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.close()
  process.stdout = None
  errors = process.communicate('\n', timeout=60)[1]  # it waits for the line
  return process.returncode, errors


@pytest.mark.parametrize(
  'script, expected',
  [
    ('raise KeyboardInterrupt', (130, 'interrupted\n')),
    ('input(); print(1)', (141, '')),
    ('input(); print("x" * 10**6)', (141, '')),
    ('pass', (0, '')),
  ],
)
def test_ends_without_a_trace(script, expected):
  assert _run(script) == expected


def test_what_is_wrong_otherwise_is_shown_as_ever():
  status, errors = _run('1 / 0')
  assert status == 1 and 'Traceback' in errors and 'ZeroDivisionError' in errors


@pytest.mark.parametrize('folder', ['tools', 'dpcap'])
def test_every_program_begins_with_it(folder):
  programs = [
    text
    for path in (_REPOSITORY / folder).glob('*.py')
    if "if __name__ == '__main__'" in (text := path.read_text())
  ]
  assert programs
  for text in programs:
    imports = [line for line in text.splitlines() if line.startswith(('import ', 'from '))]
    assert imports[0].startswith('import dpcap.ending')
