"""Elements arrive whole and in order, whatever becomes of the processes that make them."""

import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dpcap.data import guarded, loading, pipeline, watchdog
from dpcap.data.byte_ranges import StoreError
from dpcap.errors import UserError
from tests.data.test_pipeline import Numbered, make_batches


def _assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert len(x) == len(y)
    for c, d in zip(x, y):
      np.testing.assert_array_equal(c.examples['image'], d.examples['image'])
      np.testing.assert_array_equal(c.examples['tokens'], d.examples['tokens'])
      np.testing.assert_array_equal(c.mask, d.mask)
      np.testing.assert_array_equal(c.live, d.live)
      assert (c.drawn, c.bad, c.reasons) == (d.drawn, d.bad, d.reasons)


def test_workers_and_seeking_change_nothing():
  batches = make_batches(source=Numbered([3, 4, 5]), crop_scale=(0.2, 1.0), flip=True)
  direct = [batches[e] for e in range(len(batches))]
  _assert_same(list(loading.iterate(batches, 0, workers=0)), direct)
  start = 2 * batches.slots
  _assert_same(list(loading.iterate(batches, start, workers=0)), direct[start:])
  iterator = loading.iterate(batches, start, workers=2)
  _assert_same(list(iterator), direct[start:])
  iterator.close()


def _note_process(path, step):
  part = pathlib.Path(f'{path}.part')
  part.write_text(str(os.getpid()))
  part.replace(path)
  return _first_forty(step)


_PARENT = """
import functools, sys, time
from dpcap.data import loading
from tests.data import test_loading as t
batches = t.make_batches(draw=functools.partial(t._note_process, sys.argv[1]))
iterator = loading.iterate(batches, 0, workers=1)
next(iterator)
print('ready', flush=True)
time.sleep(60)
"""


def _runs(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_workers_end_with_the_process_that_started_them(tmp_path):
  """A run that is killed outright leaves no process behind."""
  path = tmp_path / 'pid'
  parent = subprocess.Popen(
    [sys.executable, '-c', _PARENT, str(path)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert parent.stdout.readline() == 'ready\n'
  worker = int(path.read_text())
  assert worker != parent.pid and _runs(worker)
  parent.kill()
  parent.wait()
  deadline = time.monotonic() + 20
  while _runs(worker) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _runs(worker)


class Deadly(Numbered):
  """Record 7 kills its process, 24 hangs it; `where` as a source of shards has it."""

  def __getitem__(self, index):
    if index == 7:
      signal.raise_signal(signal.SIGSEGV)
    if index == 24:
      time.sleep(1000)
    return super().__getitem__(index)

  def where(self, index):
    return f'shard-{index // 100}.tar'


def _first_forty(step):
  del step
  return np.arange(40)


def test_a_record_that_ends_its_process_becomes_a_bad_one_and_nothing_else_changes():
  make = functools.partial(make_batches, draw=_first_forty, steps=2, crop_scale=(0.2, 1.0))
  batches, expected = make(source=Deadly()), make(source=Numbered([7, 24]))
  found, said = [], []
  elements = loading.iterate(
    batches, 0, 1, timeout_s=2, found=lambda *place: found.append(place), say=said.append
  )
  direct = [expected[e] for e in range(len(expected))]
  arrived = list(elements)
  without_reasons = lambda chunks: [c._replace(reasons=[]) for c in chunks]
  _assert_same(*[[without_reasons(c) for c in some] for some in (arrived, direct)])
  reasons = [reason for chunks in arrived for chunk in chunks for reason in chunk.reasons]
  assert reasons.count('record 7: it ends or hangs the process that reads it') == 2
  assert found == [(7, 0), (24, 1)]
  assert re.search(
    r'^data worker 0 died \(SIGSEGV\) while it read record 7 of shard-0.tar, and a process that read'
    r' nothing else died \(SIGSEGV\): it is a bad record',
    said[0],
  )
  assert re.search(
    r'worker 0 gave nothing for 2 s \(data.worker_timeout_s\) and was killed while it read record 24'
    r' of .* gave nothing for 2 s: it is a bad record',
    said[1],
  )
  assert len(said) == 2 and not multiprocessing.active_children()
  # Who knows of them ahead reads on without them, also in this process.
  fatal = dict(found)
  again = loading.iterate(batches, 0, workers=0, fatal=fatal)
  _assert_same(list(again), arrived)


def test_what_was_made_before_a_record_was_found_stays_as_it_was():
  """So that a step that is done again comes out in the same bits."""
  batches = make_batches(draw=_first_forty, steps=3)
  direct = [batches[e] for e in range(len(batches))]
  since = 2 * batches.slots
  arrived = list(loading.iterate(batches, 0, workers=0, fatal={7: since}))
  _assert_same(arrived[:since], direct[:since])
  assert [c.bad - d.bad for c, d in zip(arrived[since], direct[since])] == [1]


@dataclasses.dataclass(frozen=True)
class Letters:
  """Element e is record e."""

  source: str = 'abcdef'

  def __len__(self):
    return len(self.source)

  def __getitem__(self, element):
    return self.source[element]


def _scripted(monkeypatch, losses, alone):
  """Loaders that lose a worker where `losses` says, in turn; `alone` is how records fare alone."""
  losses, starts = list(losses), []

  def load(batches, start, *_):
    starts.append(start)
    element, *loss = losses.pop(0) if losses else (len(batches), None)
    yield from (batches.data[e] for e in range(start, element))
    if loss != [None]:
      record, hung, code = loss
      place = watchdog.Place(element, record)
      raise loading._LostWorker(loading._Loss(0, place, hung, code))

  monkeypatch.setattr(loading, '_load', load)
  monkeypatch.setattr(guarded, 'try_alone', lambda data, place, timeout_s: alone.get(place.record))
  return starts


def test_a_worker_that_was_killed_by_others_is_replaced(monkeypatch):
  """As by hand, or by a kernel that is short of memory: no record is to blame."""
  starts = _scripted(monkeypatch, [(2, 1, False, -9), (4, -1, False, -9)], {})
  said = []
  assert ''.join(loading.iterate(Letters(), 0, 1, found=pytest.fail, say=said.append)) == 'abcdef'
  assert starts == [0, 2, 4]
  assert said[0] == (
    'data worker 0 died (SIGKILL) while it read record 1 (out of memory, or killed?); another one'
    ' goes on'
  )
  assert 'no record yet' in said[1]


@pytest.mark.parametrize(
  'code, words',
  [
    (-9, r'died \(SIGKILL\) while .* record 1 \(out of memory'),
    (-7, r'died \(SIGBUS\) while .* record 1 \(is shared memory full\? /dev/shm has'),
    (3, 'ended with status 3 while it read record 1'),
  ],
)
def test_workers_that_die_for_no_record_end_the_run(monkeypatch, code, words):
  _scripted(monkeypatch, [(2, 1, False, code), (2, 1, False, code)], {})
  elements = loading.iterate(Letters(), 0, 1, say=lambda _: None)
  assert [next(elements), next(elements)] == ['a', 'b']
  with pytest.raises(UserError, match=f'{words}.*, and it is not the first one there; the same'):
    next(elements)


def test_a_store_that_hangs_does_not_eat_the_records(monkeypatch):
  losses = [(2, record, True, -9) for record in range(9)]
  _scripted(monkeypatch, losses, dict.fromkeys(range(9), 'gave nothing for 1 s'))
  found = []
  elements = loading.iterate(
    Letters(), 0, 1, timeout_s=1, found=lambda *place: found.append(place), say=lambda _: None
  )
  with pytest.raises(UserError, match='record 2; 3 records in a row hang.*does their store answer'):
    list(elements)
  assert found == [(0, 2), (1, 2), (2, 2)]


def test_evaluations_leave_such_records_out_too():
  """Whatever lies between the loader and their source."""
  batches = pipeline.EveryNth(
    pipeline.EvaluationBatches(Numbered(), make_batches().transform, 64), 2, 1
  )
  first = guarded.GuardedBatches(batches, {70: 0, 71: 1})[0]
  assert first.labels[6] == -1 and first.labels[7] == 1 and not first.images[6].any()


def test_a_worker_that_hangs_before_its_first_record_is_killed(monkeypatch):
  monkeypatch.setattr(watchdog, 'START_TIMEOUT_S', 0.1)
  said = []
  with pytest.raises(UserError, match='did not start and was killed while it read no record yet, and it is not the first one there'):
    next(loading.iterate(make_batches(), 0, workers=1, timeout_s=0.1, say=said.append))
  assert len(said) == 1 and not multiprocessing.active_children()


class Failing(Numbered):
  """From record 7 on the store is gone."""

  def __getitem__(self, index):
    if index >= 7:
      raise StoreError(5, 'did not come in 6 attempts', 'gs://bucket/00003.tar')
    return super().__getitem__(index)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_store_that_fails_ends_the_run_with_its_name(workers):
  batches = make_batches(source=Failing(), draw=_first_forty, physical=4, per_chunk=1)
  elements = loading.iterate(batches, 0, workers)
  assert len(next(elements)) == 1
  with pytest.raises(UserError, match=r'^gs://bucket/00003.tar: did not come in 6 attempts; the'):
    next(elements)
  elements.close()
