"""Where the time of a compiled program goes, from a profiler trace of a few steps.

The trace is taken and read by jax.profiler alone. Time is counted per thread (CPU) or stream
(accelerators), and always for the innermost operation, so that nothing counts twice: a loop has
only what its body does not explain. A CPU operation that spreads over a thread pool leaves one
event where it was started and unnamed tasks elsewhere; each task counts for the operation that
queued it.
"""

import collections
import glob
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from tools.bench_parts import hlo

WAITING = 'waiting'
RUNTIME = 'runtime'

# Ends sort before starts at the same instant: an operation does not nest in its predecessor.
_END, _STOP_TASK, _START, _QUEUE, _START_TASK = range(5)


class Row(NamedTuple):
  """The time of one operation, or of several, per step.

  Attributes:
    name: XLA's name of the operation, or what the row sums over.
    kind: one of hlo.KINDS, or RUNTIME: tasks between operations, which start the next.
    origin: what it computes, in JAX's words; '' if unknown.
    ms: milliseconds, summed over threads or streams.
    calls: how often it runs.
    flops: floating-point operations of its matrix products.
  """

  name: str
  kind: str
  origin: str
  ms: float
  calls: float
  flops: float


class Profile(NamedTuple):
  """Where the time of a step goes.

  Attributes:
    wall_ms: milliseconds per step by the clock, while traced.
    rows: one per operation, longest first. Their sum is `wall_ms` times the number of threads
      or streams that were busy on average.
  """

  wall_ms: float
  rows: list[Row]


def take_profile(
  run: Callable[[], Any], operations: dict[str, hlo.Operation], steps: int
) -> Profile:
  """Traces some steps of a program that is already warm.

  Args:
    run: one step; returns its outputs, which are waited for.
    operations: of the compiled program that `run` calls, from `hlo.read_operations`.
    steps: how many to average over.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # Python's own calls would be most of the trace
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      start = time.perf_counter()
      for _ in range(steps):
        jax.block_until_ready(run())
      wall = time.perf_counter() - start
    files = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
    marks = [mark for path in files for mark in _marks(ProfileData.from_file(path))]
  nanoseconds, calls = _self_times(marks)
  rows = [
    _row(name, ns / 1e6 / steps, calls[name] / steps, operations)
    for name, ns in nanoseconds.most_common()
    if name != WAITING
  ]
  return Profile(wall * 1e3 / steps, rows)


def sum_rows(rows: Iterable[Row], key: Callable[[Row], str]) -> list[Row]:
  """Adds up rows of the same kind that `key` gives the same name; longest first."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[key(row), row.kind].append(row)
  sums = [
    Row(
      name,
      kind,
      members[0].origin,
      sum(row.ms for row in members),
      sum(row.calls for row in members),
      sum(row.flops for row in members),
    )
    for (name, kind), members in groups.items()
  ]
  return sorted(sums, key=lambda row: -row.ms)


def place(row: Row) -> str:
  """Where in the model a row's time goes: direction, module and operation.

  'jit(f)/transpose(jvp(Captioner.loss))/Captioner.memory/encoder/block_3/mlp_in/dot_general'
  is 'backward encoder/block_3/mlp_in/dot_general'. Where XLA does not say, its own name
  without the number.
  """
  if not row.origin:
    return re.sub(r'[.\d]+$', '', row.name)
  parts = row.origin.split('/')
  # Methods of the model (Captioner.memory) are on the way to every module.
  named = [p for p in parts if '(' not in p and not re.fullmatch(r'[A-Z]\w*\.\w+', p)]
  backward = 'backward ' if 'transpose(' in row.origin else ''
  return backward + ('/'.join(named) or row.origin)


def place_in_any_block(row: Row) -> str:
  """Like `place`, but the same for all blocks: 'backward encoder/block_*/mlp_in/dot_general'."""
  return re.sub(r'_\d+\b', '_*', place(row))


def _row(name: str, ms: float, calls: float, operations: dict[str, hlo.Operation]) -> Row:
  if name == RUNTIME:
    return Row(name, RUNTIME, '', ms, calls, 0)
  known = operations.get(name)
  if known is None:
    # Kernels on GPUs are called like their operation, with other punctuation, or as in a library.
    spelled = {re.sub(r'[.\-]', '_', other): other for other in operations}
    known = operations.get(spelled.get(re.sub(r'[.\-]', '_', name), ''))
  if known is None:
    kind = hlo.library_kind(name.lower()) or (hlo.COPY if 'memcpy' in name.lower() else hlo.OTHER)
    known = hlo.Operation(kind, '', 0)
  return Row(name, known.kind, known.origin, ms, calls, known.flops * calls)


def _marks(data: ProfileData) -> Iterator[tuple]:
  """(time in ns, what happens, thread, token, name or task id), of all that counts as work."""
  planes = [p for p in data.planes if p.name.startswith('/device:') and _lines(p)]
  for plane in planes[:1] or [p for p in data.planes if p.name == '/host:CPU']:
    for line in _lines(plane):
      thread = line.name
      for token, event in enumerate(line.events):
        yield from _event_marks(event, thread, token, bool(planes))


def _lines(plane) -> list:
  """The lines of a plane that show operations: one per thread, or per stream."""
  lines = list(plane.lines)
  if not plane.name.startswith('/device:'):
    return lines
  # On TPUs other lines repeat the same time by step and by module; GPUs have streams.
  by_operation = [line for line in lines if line.name == 'XLA Ops']
  return by_operation or [line for line in lines if line.name.startswith('Stream')]


def _event_marks(event, thread: str, token: int, on_device: bool) -> Iterator[tuple]:
  start, end = event.start_ns, event.start_ns + max(event.duration_ns, 1)
  if event.name.startswith('end: '):
    return
  if event.name == 'ThreadpoolListener::StopRegion':
    yield start, _STOP_TASK, thread, token, None
    return
  stats = dict(event.stats)
  if event.name == 'ThreadpoolListener::Record':
    yield start, _QUEUE, thread, token, stats.get('_p')
  elif event.name == 'ThreadpoolListener::StartRegion':
    yield start, _START_TASK, thread, token, stats.get('_c')
  else:
    name = stats.get('hlo_op') or (event.name if on_device else None)
    if not name and ('Await' in event.name or 'wait' in event.name):
      name = WAITING
    if name:
      yield start, _START, thread, token, name
      yield end, _END, thread, token, name


def _self_times(marks: list[tuple]) -> tuple[collections.Counter, collections.Counter]:
  """Nanoseconds and number of calls by operation, from the marks of all threads."""
  nanoseconds, calls = collections.Counter(), collections.Counter()
  stacks = collections.defaultdict(list)  # thread -> [(token, operation)], innermost last
  since = {}
  queued_by = {}
  for now, action, thread, token, value in sorted(marks, key=lambda mark: mark[:2]):
    stack = stacks[thread]
    if stack:
      nanoseconds[stack[-1][1]] += now - since[thread]
    since[thread] = now
    if action == _START:
      stack.append((token, value))
      calls[value] += 1
    elif action == _END and (token, value) in stack:
      stack.remove((token, value))
    elif action == _QUEUE:
      queued_by[value] = next((name for _, name in reversed(stack) if name != WAITING), RUNTIME)
    elif action == _START_TASK:
      stack.append((None, queued_by.get(value, RUNTIME)))
    elif action == _STOP_TASK:
      tasks = [i for i, (token, _) in enumerate(stack) if token is None]
      if tasks:
        del stack[tasks[-1]]
  return nanoseconds, calls
