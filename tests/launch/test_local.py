"""The local launcher: what it decides, with small programs, and a run that loses a process."""

import json
import os
import pathlib
import shlex
import signal
import sys
import threading
import time

import pytest

from dpcap.errors import UserError
from dpcap.training import processes as training_processes
from launch import local

_STEPS = 4


def _shell(script, **environment):
  return ['sh', '-c', script], environment


def test_patience_outlasts_the_others_notice():
  assert local._PATIENCE_SECONDS > training_processes.HEARTBEAT_SECONDS


@pytest.mark.parametrize(
  'statuses, asked_to_stop, expected',
  [
    ([0, 0], False, 0),
    ([0, 0], True, 0),
    ([2, 2], False, 2),
    ([75, 2], False, 2),
    ([-signal.SIGABRT, 1], False, 1),
    ([75, -signal.SIGSEGV], False, 128 + signal.SIGSEGV),
    ([143, 143], True, 143),
    ([-signal.SIGTERM, -signal.SIGTERM], True, 143),
    ([-signal.SIGKILL, -signal.SIGKILL], True, 137),
    ([143, 143], False, None),
    ([75, -signal.SIGKILL], False, None),
    ([-signal.SIGKILL, -signal.SIGABRT], False, None),
    ([0, -signal.SIGKILL], False, None),
  ],
)
def test_what_is_started_again(statuses, asked_to_stop, expected):
  assert local.verdict(statuses, asked_to_stop) == expected


def test_starts_again_until_it_succeeds(tmp_path, capfd):
  tries = tmp_path / 'tries'
  script = f'echo x >> {tries}; test $(wc -l < {tries}) -ge 3 || exit 75'
  start = lambda: [_shell(script), _shell('echo said twice; echo more >&2; sleep 0.1')]
  assert local.keep_running(start, 5, [], first_pause_s=0) == 0
  assert len(tries.read_text().split()) == 3
  error = capfd.readouterr().err
  assert error.count('launch: process 0: status 75; starting all again in 0 s') == 2
  assert error.count('[1] said twice\n[1] more\n') == 3


def test_gives_up_after_the_last_restart(capfd):
  start = lambda: [_shell('exit 0'), _shell('kill -9 $$')]
  assert local.keep_running(start, 1, [], first_pause_s=0) == 137
  assert 'process 1: SIGKILL; that was the last of 1 restarts' in capfd.readouterr().err


def test_kills_those_who_do_not_notice_a_death():
  begin = time.monotonic()
  assert local.run_once([_shell('exec sleep 60'), _shell('exit 75')], [], patience_s=0.2) == [
    -signal.SIGKILL,
    75,
  ]
  assert time.monotonic() - begin < 10


def test_passes_a_signal_on_once_and_kills_at_the_second():
  requests = []
  threading.Timer(0.5, requests.append, [signal.SIGINT]).start()
  threading.Timer(1.0, requests.append, [signal.SIGINT]).start()
  saves = _shell('trap "exit 143" TERM; while :; do sleep 0.1; done')
  hangs = _shell('trap "" TERM; while :; do sleep 0.1; done')
  assert local.run_once([saves, hangs], requests) == [143, -signal.SIGKILL]
  assert local.keep_running(lambda: [saves], 3, requests) == 143


@pytest.mark.parametrize(
  'arguments, message',
  [
    ('-- --config=x --workdir=y', 'required: --processes'),
    ('--processes=0 -- --config=x --workdir=y', '--processes=0 must be 1 or more'),
    ('--processes=2 --restarts=-1 -- --config=x', '--restarts=-1 must be 0 or more'),
    ('--processes=2 -- --workdir=y', '--config is missing'),
    ('--processes=2 -- --config=x', '--workdir is missing'),
    ('--processes=2 --config=x', 'unrecognized arguments: --config=x'),
    (
      '--processes=2 --devices_per_process=1 --gpus_per_process=1 -- --config=x --workdir=y',
      'give one',
    ),
  ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
  assert local.main(arguments.split()) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error


def test_dry_run_shows_lines_for_a_shell(monkeypatch, capsys):
  monkeypatch.setenv('XLA_FLAGS', '--a --b')
  flags = ['--config=configs/demo.py', "--workdir=/runs/it's mine"]
  assert local.main(['--processes=2', '--devices_per_process=4', '--dry_run', '--', *flags]) == 0
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert [line[-5:] for line in lines] == [[sys.executable, '-m', 'dpcap.train', *flags]] * 2
  for i, line in enumerate(lines):
    assert line[:2] == ['env', '--unset=DPCAP_MULTIHOST']
    assert f'JAX_PROCESS_ID={i}' in line and 'JAX_NUM_PROCESSES=2' in line
    assert 'XLA_FLAGS=--a --b --xla_force_host_platform_device_count=4' in line
  assert lines[0][2] == lines[1][2] and lines[0][2].startswith('JAX_COORDINATOR_ADDRESS=127.0.0.1:')


def test_gpus_are_dealt_out(monkeypatch):
  options, flags = local.parse(
    '--processes=2 --gpus_per_process=2 -- --config=x --workdir=y'.split()
  )
  visible = lambda: [e['CUDA_VISIBLE_DEVICES'] for _, e in local.processes(options, flags)]
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  assert visible() == ['0,1', '2,3']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '7,5,3,1')
  assert visible() == ['7,5', '3,1']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
  with pytest.raises(UserError, match='takes 4 GPUs'):
    visible()


def _process(parent, index):
  """Pid of the process that `parent` started as number `index` of the run."""
  for path in pathlib.Path('/proc').iterdir():
    if path.name.isdecimal():
      try:
        ppid = (path / 'stat').read_text().rpartition(')')[2].split()[1]
        environment = (path / 'environ').read_bytes().split(b'\0')
      except OSError:
        continue
      if int(ppid) == parent and b'JAX_PROCESS_ID=%d' % index in environment:
        return int(path.name)


@pytest.mark.skipif(not os.path.exists('/proc'), reason='finds the process to kill in /proc')
def test_a_run_that_loses_a_process_goes_on(program, tmp_path):
  workdir = tmp_path / 'a run'
  launcher = program(
    'launch.local',
    '--processes=2',
    '--devices_per_process=1',
    '--',
    '--config=tests/tiny.py',
    f'--workdir={workdir}',
    f'--config.train.steps={_STEPS}',
    # Without privacy, which compiles faster; steps long enough for the kill to come amid one.
    '--config.privacy.noise_multiplier=None',
    '--config.privacy.epsilon=inf',
    '--config.privacy.expected_batch_size=60',
    '--config.mesh.physical_batch=2',
  )
  deadline = time.monotonic() + 120
  while not (workdir / 'checkpoints' / '2').exists():
    assert launcher.poll() is None, launcher.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.05)
  os.kill(_process(launcher.pid, 1), signal.SIGKILL)
  error = launcher.communicate(timeout=180)[1]
  assert launcher.returncode == 0, error
  assert 'process 1: SIGKILL; starting all again in 1 s (restart 1 of 10)' in error
  assert 'resuming after step' in error
  assert json.loads((workdir / 'privacy.json').read_text())['steps'] == _STEPS
