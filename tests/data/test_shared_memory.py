"""Segments of runs that were killed are cleared, and no others; too little room is refused."""

import multiprocessing.shared_memory
import os
import subprocess
import sys

import pytest

from dpcap.data import loading, shared_memory
from dpcap.errors import UserError
from tests.data.test_pipeline import make_batches


@pytest.fixture(name='folder')
def _folder(tmp_path, monkeypatch):
  monkeypatch.setattr(shared_memory, '_SHM', tmp_path)
  return tmp_path


def _dead():
  """The number of a process that has ended."""
  process = subprocess.Popen([sys.executable, '-c', ''])
  process.wait()
  return process.pid


def test_only_what_is_ours_and_provably_dead_is_cleared(folder):
  namespace, own = shared_memory._namespace(), os.getpid()
  started = shared_memory._started(own)
  kept = [
    f'{shared_memory.owner()}0a',
    f'dpcap_{namespace + 1}_{_dead()}_5_0b',  # of a container that may live
    'psm_0123abcd',
    'dpcap_other',
  ]
  gone = [
    f'dpcap_{namespace}_{_dead()}_{started}_0c',
    f'dpcap_{namespace}_{own}_{started - 1}_0d',  # whose number was given to another one
  ]
  for name in (*kept, *gone):
    (folder / name).write_bytes(bytes(10))
  assert shared_memory.clear_dead() == 20
  assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


def test_segments_of_workers_say_whose_they_are(monkeypatch):
  monkeypatch.setattr(multiprocessing.shared_memory, '_make_filename', None)
  shared_memory.name_segments(shared_memory.owner())
  segment = multiprocessing.shared_memory.SharedMemory(create=True, size=8)
  try:
    assert segment.name.startswith(shared_memory.owner())
    assert shared_memory._NAME.fullmatch(segment.name)
  finally:
    segment.close()
    segment.unlink()


def test_too_little_room_is_refused_before_a_worker_starts(monkeypatch):
  batches = make_batches()
  assert batches.element_bytes == 16 * (4 * 4 * 3 + 8 * 4)
  chunk = batches[0][0].examples
  assert batches.element_bytes == sum(x.nbytes for x in chunk.values())
  room = os.statvfs('/')
  small = lambda path: os.statvfs_result((4096, 4096, 9, 1, 1, *tuple(room)[5:]))
  monkeypatch.setattr(os, 'statvfs', small)
  next(loading.iterate(batches, 0, workers=0))
  with pytest.raises(UserError, match='/dev/shm: 0 MiB are left, data.workers hand over up to'):
    next(loading.iterate(batches, 0, workers=1))
