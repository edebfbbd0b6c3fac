"""Shared by all tests: compiled programs, and how to run one of our programs."""

import atexit
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Compiling takes most of the tests' time, running next to none. For this process and those
# it starts; before JAX reads it.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  ]
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).parents[1]

# One cache of compiled programs for this process and those it starts.
if 'DPCAP_TESTS_CACHE' not in os.environ:
  os.environ['DPCAP_TESTS_CACHE'] = tempfile.mkdtemp(prefix='dpcap-tests-')
  atexit.register(shutil.rmtree, os.environ['DPCAP_TESTS_CACHE'], ignore_errors=True)
_CACHE_SETTINGS = {
  'jax_compilation_cache_dir': os.environ['DPCAP_TESTS_CACHE'],
  'jax_persistent_cache_min_compile_time_secs': 0.2,
  'jax_persistent_cache_min_entry_size_bytes': 0,
}
for _name, _value in _CACHE_SETTINGS.items():
  jax.config.update(_name, _value)


@pytest.fixture(scope='session')
def program():
  """Starts `python -m MODULE ARGUMENTS` in the repository; returns a Popen with text pipes."""
  environment = os.environ | {name.upper(): str(value) for name, value in _CACHE_SETTINGS.items()}
  running = []

  def start(module, *arguments, **more_environment):
    process = subprocess.Popen(
      [sys.executable, '-m', module, *arguments],
      cwd=REPOSITORY,
      env=environment | more_environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    running.append(process)
    return process

  yield start
  for process in running:
    process.kill()
    process.communicate()
