"""Runs in processes of their own: which are the same, how they fail, how they are stopped."""

import json
import os
import pathlib
import signal
import sys
import threading

import pytest

from tools import runs


def _config(words='smoke,dpcap', **changes):
  config = runs.load(f'configs/scenes.py:{words}')
  config.update(changes)
  return config


def test_the_same_config_by_other_words_is_the_same_run(tmp_path):
  of = runs.Runs(tmp_path)
  assert of.folder(_config()) == of.folder(_config('dpcap,smoke,base,epsilon8'))
  assert of.folder(_config()) != of.folder(_config('smoke,dpcap,epsilon2'))
  # What does not change the result does not make another run.
  assert of.folder(_config()) == of.folder(_config(mesh={'physical_batch': 4}))
  assert of.folder(_config()).parent == tmp_path / 'runs'


def test_a_run_is_trained_when_all_its_steps_are_done(tmp_path):
  of, config = runs.Runs(tmp_path), _config()
  assert of.statement(config) == {} and not of.is_trained(config)
  of.folder(config).mkdir(parents=True)
  for steps, trained in ((config.train.steps - 1, False), (config.train.steps, True)):
    (of.folder(config) / 'privacy.json').write_text(json.dumps({'steps': steps}))
    assert of.is_trained(config) == trained


def test_a_failure_is_told_by_its_last_line(tmp_path, capsys):
  of = runs.Runs(tmp_path)
  program = 'import sys; print("step 1"); print("error: no"); print(); sys.exit(3)'
  assert of.start('training', ['python', '-c', program]) == (
    'training ended with status 3: error: no'
  )
  assert 'step 1' in capsys.readouterr().err
  # It stays on the screen where it may tell of private data: reasons go to files.
  failed = of.start('training', ['python', '-c', program], private=True)
  assert failed == 'training ended with status 3' and 'error: no' in capsys.readouterr().err
  # The Python that runs this is what a command's python is.
  program = f'import sys; sys.exit(sys.executable != {sys.executable!r})'
  assert of.start('training', ['python', '-c', program]) is None


def test_commands_name_no_more_of_a_path_than_was_given(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  of = runs.Runs(pathlib.Path('study'))
  of.note(['python', f'{tmp_path}/study/x', 'a b'])
  assert of.commands == ["python study/x 'a b'"]


def test_sigterm_stops_what_is_running_and_then_all(tmp_path):
  of = runs.Runs(tmp_path)
  program = 'import time; print("here", flush=True); time.sleep(60)'
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stopped, of.stoppable():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    of.start('training', ['python', '-c', program])
  assert stopped.value.code == runs.STOPPED
  assert signal.getsignal(signal.SIGTERM) == before
