"""The same work on many files: in processes or threads, under a progress bar."""

import concurrent.futures
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich import progress
from rich.console import Console

from dpcap.data import watchdog
from dpcap.data.byte_ranges import is_local
from dpcap.data.tar_index import THREADS

EXECUTORS = ('auto', 'processes', 'threads')
_SECONDS_BETWEEN_LINES = 10.0


def run_each(
  work: Callable[[Any], Any],
  items: Sequence[Any],
  files: Iterable[str],
  executor: str,
  workers: int | None,
) -> Iterator[tuple[int, Any]]:
  """Yields (number of the item, what `work` made of it) as they are done.

  Args:
    work: a function of a module, or a partial of one.
    items: what it is called with.
    files: paths or URLs that it reads; auto takes processes where all are local.
    executor: one of EXECUTORS.
    workers: of those; None: one per core, or THREADS threads.
  """
  if executor == 'auto':
    executor = 'processes' if all(map(is_local, files)) else 'threads'
  if executor == 'threads':
    pool = concurrent.futures.ThreadPoolExecutor(workers or THREADS)
  else:
    context = multiprocessing.get_context('forkserver')
    # Imported once, there, instead of in each process.
    function = work.func if isinstance(work, functools.partial) else work
    context.set_forkserver_preload([function.__module__])
    pool = concurrent.futures.ProcessPoolExecutor(
      workers or os.cpu_count(), context, initializer=watchdog.follow_parent
    )
  try:
    number_of = {pool.submit(work, item): number for number, item in enumerate(items)}
    for future in concurrent.futures.as_completed(number_of):
      yield number_of[future], future.result()
  finally:
    # Processes end with this one, whatever they are at.
    pool.shutdown(wait=executor == 'threads', cancel_futures=True)


def show_progress(
  title: str,
  results: Iterable[tuple[Any, Any]],
  total: int,
  unit: str = 'shards',
  size: Callable[[Any], int] = lambda name: 1,
  count: Callable[[Any], str] = lambda result: '',
) -> Iterator[tuple[Any, Any]]:
  """Passes results on under a progress bar; on a screen that is none, a line now and then.

  Args:
    title: what is done.
    results: pairs, the first of which names what was done, as those of `run_each`.
    total: how many units there will be.
    unit: what is counted.
    size: how many units a name stands for.
    count: is called with the second of each pair, and says what has been found so far.
  """
  console = Console(file=sys.stderr, highlight=False)
  done, last_line = 0, time.monotonic()
  with progress.Progress(
    progress.TextColumn(title),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn(f'{unit}  {{task.fields[found]}}'),
    progress.TimeRemainingColumn(),
    console=console,
    disable=not console.is_terminal,
  ) as bar:
    task = bar.add_task('', total=total, found='')
    for result in results:
      done += size(result[0])
      found = count(result[1])
      bar.update(task, completed=done, found=found)
      if not console.is_terminal and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
        last_line = time.monotonic()
        console.print(f'{title}: {done:,} of {total:,} {unit}  {found}', soft_wrap=True)
      yield result
