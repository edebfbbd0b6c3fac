"""What the person who trains sees."""

import time

from dpcap.training.progress import Progress, doing


def test_without_a_terminal_lines_tell_loss_epsilon_rate_and_time_left(capsys):
  with Progress(4, 0, 100, private=True) as progress:
    progress.after_step(1, 3.25, 0.5)
    progress.after_step(4, 1.125, 7.9876)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'compiling the step ...'
  assert lines[1].startswith('step 1/4  loss 3.250  epsilon 0.50') and 'images/s' in lines[1]
  assert lines[-1].startswith('step 4/4  loss 1.125  epsilon 7.99') and '0 s left' in lines[-1]


def test_rate_counts_this_process_s_steps_only(monkeypatch):
  now = [100.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  progress = Progress(10, 4, 50, private=False)
  now[0] += 2.0
  progress.within_step(5, 0.5)
  assert progress.images_per_second == 1.5 * 50 / 2


def test_what_takes_long_is_told_of_and_what_does_not_is_not(capsys, monkeypatch):
  monkeypatch.setattr('dpcap.training.progress._WORTH_TELLING', 0.01)
  with doing('accounting'):
    time.sleep(0.2)
  assert capsys.readouterr().err == 'accounting ...\n'
  monkeypatch.setattr('dpcap.training.progress._WORTH_TELLING', 60)
  with doing('accounting'):
    pass
  assert capsys.readouterr().err == ''
