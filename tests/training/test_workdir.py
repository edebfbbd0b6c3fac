"""What stands in a workdir follows from its newest checkpoint, also while a run goes on."""

import json
import os
import shutil
import stat

import pytest

from dpcap.errors import UserError
from dpcap.training import workdir as workdir_lib
from tests import checkpoint_files


def _checkpoint(workdir, step):
  checkpoint_files.write(workdir / 'checkpoints' / str(step), {'steps': step})


def _steps(workdir):
  return json.loads((workdir / 'privacy.json').read_text())['steps']


def test_without_a_checkpoint_nothing_is_said_or_taken_back(tmp_path):
  workdir_lib.publish_statement(tmp_path)
  assert not list(tmp_path.iterdir())
  (tmp_path / 'privacy.json').write_text('{"steps": 3}')
  workdir_lib.publish_statement(tmp_path)
  assert _steps(tmp_path) == 3


def test_a_statement_that_is_right_is_left_alone(tmp_path):
  _checkpoint(tmp_path, 10)
  _checkpoint(tmp_path, 9)
  workdir_lib.publish_statement(tmp_path)
  assert _steps(tmp_path) == 10
  before = (tmp_path / 'privacy.json').stat()
  workdir_lib.publish_statement(tmp_path)
  after = (tmp_path / 'privacy.json').stat()
  assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


@pytest.mark.parametrize('when', ['before reading', 'before writing'])
def test_a_checkpoint_that_comes_meanwhile_is_the_one_that_counts(tmp_path, monkeypatch, when):
  """The run writes a newer one and its statement, and keeps only that."""
  _checkpoint(tmp_path, 2)
  name = 'read_statement' if when == 'before reading' else 'write_whole'
  real = getattr(workdir_lib, name)

  def meanwhile(*args):
    if not (tmp_path / 'checkpoints/4').exists():
      _checkpoint(tmp_path, 4)
      (tmp_path / 'privacy.json').write_text('{"steps": 4}')
      shutil.rmtree(tmp_path / 'checkpoints/2')
    return real(*args)

  monkeypatch.setattr(workdir_lib, name, meanwhile)
  workdir_lib.publish_statement(tmp_path)
  assert _steps(tmp_path) == 4


def test_a_file_is_never_open_to_others_and_no_rest_of_a_crash_makes_it_so(tmp_path, monkeypatch):
  monkeypatch.setattr('os.getpid', lambda: 7)
  path = tmp_path / 'report.private.html'
  for name in (path.name, f'{path.name}.7.tmp'):
    (tmp_path / name).write_text('older')
    (tmp_path / name).chmod(0o666)
  with (tmp_path / f'{path.name}.7.tmp').open() as held:
    workdir_lib.write_whole(path, 'new')
    assert held.read() == 'older'
  assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == 'new'
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_may_be_private_whatever_its_name(tmp_path, monkeypatch):
  """From the first moment: a crash cannot leave it open."""
  opened, real = [], os.open
  monkeypatch.setattr('os.open', lambda *args: opened.append(args[2]) or real(*args))
  for private, mode in ((True, 0o600), (False, 0o666)):
    workdir_lib.write_whole(tmp_path / 'seen.json', 'x', private)
    assert opened.pop() == mode
  workdir_lib.write_whole(tmp_path / 'x.private.json', 'x', private=False)
  assert opened == [0o600]


@pytest.mark.parametrize(
  'name, private',
  [
    ('diagnostics.private.jsonl', True),
    ('events.out.tfevents.1.host.private', True),
    ('report.html', False),
    ('private_probe.json', False),
  ],
)
def test_names_say_what_is_private(tmp_path, name, private):
  assert workdir_lib.is_private(tmp_path / name) == private


@pytest.mark.parametrize('length, what', [(247, None), (248, 'name is 1 bytes too long')])
def test_a_name_too_long_for_what_is_made_beside_it_is_refused(tmp_path, length, what):
  check = lambda: workdir_lib.check_length(tmp_path / 'absent' / ('x' * length))
  if what is None:
    check()
  else:
    with pytest.raises(UserError, match=what):
      check()


def test_a_path_too_long_for_what_is_made_in_it_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'--workdir: its path is \d+ bytes too long'):
    workdir_lib.check_length(tmp_path / ('x' * 200 + '/') / '/'.join(['y' * 200] * 18))
