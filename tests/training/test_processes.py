"""Runs of two real processes, and what becomes of them when one is stopped or killed."""

import json
import os
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from dpcap.ending import LOST, STOPPED
from dpcap.errors import UserError
from dpcap.training import loop, processes
from dpcap.training.checkpoints import Checkpoints
from tests import tiny

_STEPS = 12
_CHANGES = {
  'train.steps': _STEPS,
  'privacy.expected_batch_size': 150,
  'privacy.clipping': 'vmap',  # compiles fast; test_mesh.py has the others
  'train.evaluate_at': (_STEPS,),
}


def _start(program, workdir, *arguments, count=2, **environment):
  """Two processes of two devices each."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  flags = [f'--config.{key}={value}' for key, value in _CHANGES.items()]
  return [
    program(
      'dpcap.train',
      '--config=tests/tiny.py',
      f'--workdir={workdir}',
      *flags,
      *arguments,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES=str(count),
      JAX_PROCESS_ID=str(i),
      XLA_FLAGS=f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2',
      **environment,
    )
    for i in range(count)
  ]


def _wait_for(path, lines, running):
  deadline = time.monotonic() + 120
  while not (path.exists() and len(path.read_text().splitlines()) >= lines):
    assert all(p.poll() is None for p in running), [p.communicate()[1] for p in running]
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _losses(workdir):
  lines = (workdir / 'diagnostics.private.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines]


def test_two_processes_stopped_and_killed_compute_what_one_does(program, tmp_path):
  config = tiny.get_config()
  for key, value in _CHANGES.items():
    section, name = key.split('.')
    config[section][name] = value
  expected = loop.train(config, tmp_path / 'one')

  workdir = tmp_path / 'two'
  # SIGTERM to one stops both, at the same moment, and both save. Notice of it takes seconds to
  # go round, less than compiling the first step does.
  running = _start(program, workdir)
  _wait_for(workdir / 'config.json', 1, running)
  running[1].send_signal(signal.SIGTERM)
  errors = [p.communicate(timeout=60)[1] for p in running]
  assert [p.returncode for p in running] == [STOPPED] * 2, errors
  assert 'saved; the same command goes on' in errors[0]

  # The death of one ends the other, within a bounded time.
  running = _start(program, workdir)
  _wait_for(workdir / 'metrics.jsonl', 4, running)
  running[1].kill()
  error = running[0].communicate(timeout=3 * processes.HEARTBEAT_SECONDS)[1]
  # It may be JAX's own thread that notices, and ends the process.
  assert running[0].returncode in (LOST, -signal.SIGABRT), error
  assert 'lost another process of this run' in error or 'another task died' in error

  running = _start(program, workdir)
  errors = [p.communicate(timeout=120)[1] for p in running]
  assert [p.returncode for p in running] == [0, 0], errors
  assert 'resuming after step' in errors[0]
  # Devices that are not connected yet would wait for each other for 30 s only.
  assert 'resuming after step' in errors[0].rpartition('[Gloo]')[2]
  # Nothing was released twice, and every draw and noise is that of one process.
  statement = json.loads((workdir / 'privacy.json').read_text())
  assert statement['releases'] == statement['steps'] == _STEPS
  np.testing.assert_allclose(_losses(workdir), _losses(tmp_path / 'one'), rtol=1e-5)
  checkpoints = Checkpoints(workdir / 'checkpoints', read_only=True)
  actual = checkpoints.restore(_STEPS, expected).params
  checkpoints.close()
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
  jax.tree.map(close, actual, expected.params)
  # Each process had every second batch of the evaluation.
  many, one = (
    json.loads((tmp_path / run / f'evals/step_{_STEPS}/written.json').read_text())
    for run in ('two', 'one')
  )
  assert many['n'] == one['n'] == 5
  assert [c['index'] for c in many['captions']] == [c['index'] for c in one['captions']]
  assert many['perplexity'] == pytest.approx(one['perplexity'], rel=1e-4)

  # Where a step that is done again comes out in other bits, which the main one sees, all go back.
  shutil.rmtree(workdir / f'checkpoints/{_STEPS}')
  # And nobody needs the service that passes notices of preemption on.
  running = _start(
    program, workdir, '--config.mesh.physical_batch=4', JAX_ENABLE_PREEMPTION_SERVICE='false'
  )
  errors = [p.communicate(timeout=120)[1] for p in running]
  assert [p.returncode for p in running] == [0, 0], errors
  assert f'step {_STEPS - 1}, done again, came out in other bits' in errors[0]
  statement = json.loads((workdir / 'privacy.json').read_text())
  assert (statement['steps'], statement['releases']) == (_STEPS, _STEPS + 2)


@pytest.mark.parametrize(
  'environment, message',
  [
    ({'JAX_NUM_PROCESSES': '2'}, 'JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set'),
    (
      {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'},
      "JAX_PROCESS_ID is '2' and JAX_NUM_PROCESSES '2'",
    ),
    (
      {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': 'two', 'JAX_PROCESS_ID': '0'},
      'must be whole numbers',
    ),
  ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, environment, message):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=message):
    processes.initialize()


def test_one_process_of_one_needs_nobody(monkeypatch):
  for name, value in zip(
    ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'), ('a:1', '1', '0')
  ):
    monkeypatch.setenv(name, value)
  processes.initialize()
  assert processes.is_main()
  assert processes.from_main(lambda: {'a': 1}) == {'a': 1}


def test_without_the_service_of_notices_processes_ask_each_other(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, 'gather', lambda mine: np.stack([mine, np.array([True])]))
  assert processes.notices_are_passed_on()
  jax.config.update('jax_enable_preemption_service', False)
  try:
    assert not processes.notices_are_passed_on()
    assert processes.stop_is_due([], 0)
  finally:
    jax.config.update('jax_enable_preemption_service', True)


@pytest.mark.parametrize(
  'error, expected',
  [
    (jax.errors.JaxRuntimeError('UNAVAILABLE: another task died'), True),
    (ValueError('UNKNOWN: Gloo AllGather failed: Connection reset by peer'), True),
    (ValueError('RESOURCE_EXHAUSTED: no space left on device'), False),
  ],
)
def test_a_loss_is_told_from_other_errors(monkeypatch, error, expected):
  assert not processes.is_loss(error)  # one process has none to lose
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert processes.is_loss(error) == expected
