"""The launchers for clusters: their dry runs, and what they do with stand-ins for a cluster's tools."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sysconfig
import time

import pytest
import yaml

_REPOSITORY = pathlib.Path(__file__).parents[2]
_LAUNCH = _REPOSITORY / 'launch'
_SCRIPTS = sorted(path.name for path in _LAUNCH.glob('*.sh'))
_FLAGS = [
  '--config=configs/dpcap.py:base',
  "--workdir=/runs/it's a run",
  '--config.data.source.path=/data/{0..9}.tar',
  '--config.data.x="a"  b',
]
_SETTINGS = {
  'gke_xpk.sh': {
    'name': 'mine',
    'cluster': 'tpus',
    'project': 'p',
    'zone': 'us-east5-b',
    'tpu_type': 'v6e-64',
    'image': 'registry/dpcap:1',
    'storage': 'runs',
  },
  'sky.sh': {'nodes': '2', 'gpus': 'H100:8', 'infra': 'gcp', 'setup': 'a && sudo b "c d"'},
  'slurm.sh': {'nodes': '4', 'gpus_per_node': '8'},
  'tpu_vm.sh': {
    'name': 'mine',
    'zone': 'us-east5-b',
    'accelerator': 'v6e-64',
    'version': 'v2-alpha-tpuv6e',
    'setup': 'mountpoint -q /nfs || sudo mount a:/b /nfs',
    'directory': '/nfs/dp cap',
    'python': '/nfs/env/bin/python',
  },
}


def _launch(script, *arguments, path=None):
  environment = dict(os.environ, **({'PATH': f'{path}:{os.environ["PATH"]}'} if path else {}))
  command = ['bash', str(_LAUNCH / script), *arguments]
  return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def _arguments(script, **changes):
  settings = _SETTINGS[script] | changes
  return [f'--{name}={value}' for name, value in settings.items() if value is not None]


def _dry_run(script, **changes):
  """The commands that the launcher would start, as lists of words."""
  done = _launch(script, *_arguments(script, **changes), '--dry_run', '--', *_FLAGS)
  assert done.returncode == 0 and not done.stderr, done.stderr
  return [words for line in done.stdout.splitlines() if (words := shlex.split(line, comments=True))]


def _value(words, name):
  (value,) = [word.partition('=')[2] for word in words if word.startswith(f'--{name}=')]
  return value


def test_gke_xpk():
  (command,) = _dry_run('gke_xpk.sh', slices=2)
  assert command[:3] == ['xpk', 'workload', 'create']
  assert shlex.split(_value(command, 'command')) == [
    *('exec', 'env', 'DPCAP_MULTIHOST=1', 'python3', '-m', 'dpcap.train'),
    *_FLAGS,
  ]
  names = ('workload', 'tpu-type', 'num-slices', 'max-restarts', 'restart-on-exit-codes', 'storage')
  assert [_value(command, name) for name in names] == ['mine', 'v6e-64', '2', '100', '75', 'runs']


def test_slurm():
  submit, step = _dry_run('slurm.sh', cpus=12)
  job = [str(_LAUNCH / 'slurm_job.sh'), '100', '12']
  train = ['.venv/bin/python', '-m', 'dpcap.train', *_FLAGS]
  assert submit[0] == 'sbatch' and submit[-len(job + train) :] == job + train
  assert {'--requeue', '--signal=TERM@300', '--nodes=4', '--cpus-per-task=12'} < set(submit)
  assert _value(submit, 'ntasks-per-node') == _value(submit, 'gpus-per-node') == '8'
  assert step[:3] == ['env', 'DPCAP_MULTIHOST=1', 'srun'] and step[-len(train) :] == train
  assert '--cpus-per-task=12' in step


def test_sky():
  (command,) = _dry_run('sky.sh')
  assert command[:3] == ['sky', 'jobs', 'launch'] and command[-1] == str(_LAUNCH / 'sky.yaml')
  given = dict(word[6:].split('=', 1) for word in command if word.startswith('--env='))
  assert given['SETUP'] == _SETTINGS['sky.sh']['setup']
  assert '--use-spot' in command and '--num-nodes=2' in command
  task = yaml.safe_load((_LAUNCH / 'sky.yaml').read_text())
  assert set(task['envs']) == set(given)
  # What every node runs, with a stand-in for its Python.
  script = task['run'].replace('~/dpcap-env/bin/python', 'show').replace('exec ', '')
  done = subprocess.run(
    ['bash', '-c', f'show() {{ env | grep ^JAX_; printf "%s\\n" "$@"; }}\n{script}'],
    env={
      'PATH': os.environ['PATH'],
      'FLAGS': given['FLAGS'],
      'SETUP': 'true',
      'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
      'SKYPILOT_NUM_NODES': '2',
      'SKYPILOT_NODE_RANK': '1',
    },
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert sorted(lines[:3]) == [
    'JAX_COORDINATOR_ADDRESS=10.0.0.1:8476',
    'JAX_NUM_PROCESSES=2',
    'JAX_PROCESS_ID=1',
  ]
  assert lines[3:] == ['-m', 'dpcap.train', *_FLAGS]


def test_tpu_vm():
  create, start, attend = _dry_run('tpu_vm.sh')
  assert create[:5] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create']
  assert '--spot' in create and '--node-id=mine' in create
  assert '--spot' not in _dry_run('tpu_vm.sh', spot='no')[0]
  assert (_value(start, 'worker'), _value(attend, 'worker')) == ('all', '0')
  service = shlex.split(_value(start, 'command').partition('&& ')[2])
  assert service[:3] == ['sudo', 'systemd-run', '--unit=dpcap']
  assert '--working-directory=/nfs/dp cap' in service and '--setenv=DPCAP_MULTIHOST=1' in service
  train = ['/nfs/env/bin/python', '-m', 'dpcap.train', *_FLAGS]
  assert service[-len(train) :] == train
  for command in (start, attend):
    assert subprocess.run(['bash', '-n', '-c', _value(command, 'command')]).returncode == 0


@pytest.mark.parametrize(
  'script, name', [(s, n) for s, settings in _SETTINGS.items() for n in settings]
)
def test_a_missing_setting_is_named(script, name):
  done = _launch(script, *_arguments(script, **{name: None}), '--dry_run', '--', *_FLAGS)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(f'error: --{name} is missing') and done.stderr.count('\n') == 1


@pytest.mark.parametrize(
  'script, name, value',
  [
    ('slurm.sh', 'nodes', 'two'),
    ('slurm.sh', 'gpus_per_node', '0'),
    ('slurm.sh', 'cpus', '1.5'),
    ('slurm.sh', 'grace', '5m'),
    ('sky.sh', 'nodes', '-1'),
    ('gke_xpk.sh', 'slices', '1e3'),
    ('tpu_vm.sh', 'restarts', 'inf'),
  ],
)
def test_numbers_that_are_none_are_refused(script, name, value):
  done = _launch(script, *_arguments(script, **{name: value}), '--dry_run', '--', *_FLAGS)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(f'error: --{name}={value} must be a whole number')
  assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('script', _SETTINGS)
def test_wrong_arguments_are_refused(script):
  for more, message in (
    (['--nodse=2', '--', *_FLAGS], '--nodse is no setting'),
    (['--config=x'], '--config is no setting'),
    (['--', *_FLAGS[:1]], '--workdir is missing'),
    (['--', *_FLAGS[1:]], '--config is missing'),
    ([], '--config is missing'),
  ):
    done = _launch(script, *_arguments(script), *more)
    assert done.returncode == 2 and done.stderr.startswith(f'error: {message}'), done.stderr
  help = _launch(script, '--help').stdout
  assert all(f'--{name}' in help for name in [*_SETTINGS[script], 'dry_run'])


@pytest.mark.parametrize('script', _SCRIPTS)
def test_shellcheck(script):
  checker = shutil.which('shellcheck', path=sysconfig.get_path('scripts')) or 'shellcheck'
  command = [checker, '--external-sources', f'launch/{script}']
  done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_readme_names_every_launcher():
  text = (_LAUNCH / 'README.md').read_text()
  assert set(_SETTINGS) | {'launch.local'} <= set(re.findall(r'[\w.]+', text))


def _tool(directory: pathlib.Path, name: str, script: str) -> None:
  path = directory / name
  path.write_text(f'#!/bin/sh\n{script}\n')
  path.chmod(0o755)


@pytest.mark.parametrize(
  'status, restarts, requeued',
  [(0, 5, False), (1, 5, False), (2, 5, False), (143, 5, True), (75, 5, True), (137, 3, False)],
)
def test_slurm_job_requeues_itself(tmp_path, monkeypatch, status, restarts, requeued):
  _tool(tmp_path, 'srun', f'exit {status}')
  _tool(tmp_path, 'scontrol', f'echo "$@" > {tmp_path}/asked')
  monkeypatch.setenv('SLURM_JOB_ID', '17')
  monkeypatch.setenv('SLURM_RESTART_COUNT', '3')
  done = _launch('slurm_job.sh', str(restarts), '8', 'python', path=tmp_path)
  assert done.returncode == status
  asked = tmp_path / 'asked'
  assert (asked.read_text() if asked.exists() else '') == 'requeue Incomplete 17\n' * requeued


@pytest.mark.parametrize('last, expected', [(0, 0), (2, 2)])
def test_tpu_vm_comes_back_after_a_preemption(tmp_path, last, expected):
  """Nothing there, then preempted, then only the connection breaks, then the end."""
  states, ends = tmp_path / 'states', tmp_path / 'ends'
  states.write_text('\nACTIVE\nSUSPENDED\nSUSPENDED\n\nACTIVE\nACTIVE\n')
  ends.write_text(f'255\n255\n{last}\n')
  take = lambda path: f'head -n1 {path}; sed -i 1d {path}'
  _tool(
    tmp_path,
    'gcloud',
    f"""
    echo "$@" >> {tmp_path}/log
    case "$*" in
      *resources\\ list*) {take(states)};;
      *worker=0*) exit $({take(ends)});;
    esac
    """,
  )
  _tool(tmp_path, 'sleep', '')
  done = _launch('tpu_vm.sh', *_arguments('tpu_vm.sh'), '--', *_FLAGS, path=tmp_path)
  assert done.returncode == expected, done.stderr
  log = re.findall(
    r'queued-resources (create|delete)|ssh mine .*worker=(all|0)', (tmp_path / 'log').read_text()
  )
  assert [''.join(names) for names in log] == [
    *('create', 'all', '0'),
    *('delete', 'create', 'all', '0', '0'),
  ]


def test_tpu_vm_ends_if_its_hosts_cannot_be_set_up(tmp_path):
  _tool(tmp_path, 'gcloud', 'case "$*" in *list*) echo ACTIVE;; *worker=all*) exit 1;; esac')
  done = _launch('tpu_vm.sh', *_arguments('tpu_vm.sh'), '--', *_FLAGS, path=tmp_path)
  assert done.returncode == 2
  assert done.stderr == 'error: not all hosts of mine could start; see above\n'


def test_tpu_vm_passes_a_stop_on(tmp_path):
  log = tmp_path / 'log'
  _tool(
    tmp_path,
    'gcloud',
    f'echo "$@" >> {log}; case "$*" in *list*) echo ACTIVE;; *worker=0*) exec sleep 5;; esac',
  )
  command = ['bash', str(_LAUNCH / 'tpu_vm.sh'), *_arguments('tpu_vm.sh'), '--', *_FLAGS]
  environment = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  launcher = subprocess.Popen(command, env=environment)
  deadline = time.monotonic() + 30
  while not (log.exists() and 'worker=0' in log.read_text()):
    assert launcher.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  launcher.terminate()
  assert launcher.wait(timeout=4) == 143
  last = log.read_text().splitlines()[-1]
  assert 'worker=all' in last and 'systemctl stop dpcap' in last and 'systemd-run' not in last
