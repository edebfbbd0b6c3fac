"""Shared by all tests: compiled programs, and how to run one of our programs."""

import atexit
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Compiling takes most of the tests' time, running next to none.
_IN_HASTE = (
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_cpu_use_fusion_emitters=false',
  '--xla_cpu_parallel_codegen_split_count=1',
)


def _known(flag):
  """Whether this version of XLA has the flag: it does not start with one that it has not."""
  start = [sys.executable, '-c', 'import jax; jax.devices()']
  environment = os.environ | {'XLA_FLAGS': flag}
  return not subprocess.run(start, env=environment, capture_output=True).returncode


# For this process and those it starts, which inherit them; before JAX reads them.
if 'DPCAP_TESTS_CACHE' not in os.environ:
  flags = ' '.join(_IN_HASTE)
  flags = flags if _known(flags) else ' '.join(filter(_known, _IN_HASTE))
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()

import jax  # noqa: E402
import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).parents[1]

# Files that take longest, for the most part by waiting: they start first, beside others.
_LONGEST = ('test_processes', 'test_local', 'test_loop', 'test_mesh', 'test_strategies')

# Files that take more than 10 s each: `make check` leaves them out.
_LONG = {
  *_LONGEST,
  'test_accounting',
  'test_bench_clipping',
  'test_blocks',
  'test_captioner',
  'test_classifiers',
  'test_clipped_sum',
  'test_command_line',
  'test_compilation_cache',
  'test_computed_once',
  'test_evaluation',
  'test_hard_inputs',
  'test_initialization',
  'test_loading',
  'test_norms',
  'test_oracle',
  'test_reproduce',
  'test_sensitivity',
  'test_statement',
  'test_step',
  'test_tracing',
  'test_train_and_evaluate',
  'test_worst_case',
}

# One cache of compiled programs for this process and those it starts.
if 'DPCAP_TESTS_CACHE' not in os.environ:
  os.environ['DPCAP_TESTS_CACHE'] = tempfile.mkdtemp(prefix='dpcap-tests-')
  atexit.register(shutil.rmtree, os.environ['DPCAP_TESTS_CACHE'], ignore_errors=True)
# Nor does anything else come from the user's cache, or go there.
os.environ['XDG_CACHE_HOME'] = os.environ['DPCAP_TESTS_CACHE']
_CACHE_SETTINGS = {
  'jax_compilation_cache_dir': os.environ['DPCAP_TESTS_CACHE'],
  'jax_persistent_cache_min_compile_time_secs': 0.2,
  'jax_persistent_cache_min_entry_size_bytes': 0,
}
for _name, _value in _CACHE_SETTINGS.items():
  jax.config.update(_name, _value)


def pytest_collection_modifyitems(items):
  """The longest files first, or the last of them would run alone in the end."""
  place = {name: i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))
  for item in items:
    if item.path.stem in _LONG:
      item.add_marker(pytest.mark.long)


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
