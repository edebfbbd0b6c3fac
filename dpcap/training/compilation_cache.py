"""Compiled programs kept on disk, so that a run that starts again does not compile again.

What is private must be an argument of what is compiled: keys, examples, features of private
images. A constant would be written to the disk with the program.
"""

import os
import pathlib

import jax

# Programs used longest ago make room.
_MAX_BYTES = 4 * 2**30

# Seconds of compilation that are worth a file.
_WORTH_KEEPING = 0.5


def keep_compiled_programs() -> None:
  """Has JAX keep what it compiles in the user's cache folder, which others cannot read.

  JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
  Where the folder cannot be written, everything is compiled anew each time.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = pathlib.Path(cache) / 'dpcap' / 'compiled'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    # What a killed process left half written would keep JAX from writing anything more.
    for program in folder.glob('*-cache'):
      if not program.with_name(program.name.removesuffix('-cache') + '-atime').exists():
        program.unlink(missing_ok=True)
  except OSError:
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_compilation_cache_max_size', _MAX_BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', _WORTH_KEEPING)
