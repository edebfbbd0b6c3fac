"""Shared memory, through which workers hand over what they made: enough, and none of the dead.

A run that is killed outright leaves its segments in /dev/shm until the machine starts again.
Workers therefore give them names that tell whose they are: the main process of the run, by its
number, when it started, and in which namespace of numbers that holds (containers may share it).
"""

import contextlib
import multiprocessing.shared_memory
import os
import pathlib
import re
import secrets

from dpcap.errors import UserError

_SHM = pathlib.Path('/dev/shm')
_NAME = re.compile(r'dpcap_(\d+)_(\d+)_(\d+)_[0-9a-f]+')


def owner() -> str:
  """What names of segments begin with that belong to this process."""
  return f'dpcap_{_namespace()}_{os.getpid()}_{_started(os.getpid())}_'


def name_segments(beginning: str) -> None:
  """All segments that this process makes from now on begin with that, which `owner` gave."""
  # The library has no other way to name segments of who only asks for some.
  multiprocessing.shared_memory._make_filename = lambda: f'/{beginning}{secrets.token_hex(6)}'


def clear_dead() -> int:
  """Removes the segments of this user's processes that are dead; returns how many bytes.

  Whether one is dead is known only of those in this namespace; others are left alone.
  """
  freed = 0
  for path in _SHM.glob('dpcap_*'):
    match = _NAME.fullmatch(path.name)
    with contextlib.suppress(FileNotFoundError):
      about = path.stat()
      if not match or about.st_uid != os.getuid() or int(match[1]) != _namespace():
        continue
      if _started(int(match[2])) != int(match[3]):
        path.unlink()
        freed += about.st_size
  return freed


def check_room(needed: int) -> None:
  """Refuses to start where /dev/shm has less than so many bytes left.

  A process that writes where nothing is left is killed (SIGBUS).

  Raises:
    UserError: saying what to do.
  """
  if not _SHM.is_dir():
    return
  room = os.statvfs(_SHM)
  free = room.f_bavail * room.f_frsize
  if free < needed:
    raise UserError(
      f'{_SHM}: {free / 2**20:,.0f} MiB are left, data.workers hand over up to'
      f' {needed / 2**20:,.0f} MiB through it; give it more (docker run --shm-size=..., on'
      ' Kubernetes an emptyDir of medium Memory mounted there), or lower data.workers,'
      ' mesh.batches_per_chunk or mesh.physical_batch'
    )


def _namespace() -> int:
  return os.stat('/proc/self/ns/pid').st_ino


def _started(process: int) -> int | None:
  """When a process started, in ticks since the machine did; None if it does not run."""
  try:
    fields = pathlib.Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
  except (FileNotFoundError, ProcessLookupError):
    return None
  return None if fields[0] == 'Z' else int(fields[19])
