"""How far an evaluation has come: a bar, or a line now and then where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from rich import progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0


def track(title: str, items: Iterable[Any], total: int, unit: str = 'batches') -> Iterator[Any]:
  """Yields `items`, `total` of them, and shows how many have been used; on the main process."""
  console = Console(file=sys.stderr)
  main = jax.process_index() == 0
  bar = progress.Progress(
    progress.TextColumn('{task.description}'),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn(unit),
    progress.TimeRemainingColumn(),
    console=console,
    disable=not (main and console.is_terminal),
    transient=True,
  )
  said = time.monotonic()
  with bar:
    task = bar.add_task(title, total=total)
    for done, item in enumerate(items, 1):
      yield item
      bar.update(task, completed=done)
      if main and not console.is_terminal and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
        said = time.monotonic()
        console.print(f'{title}: {done:,} of {total:,} {unit}', highlight=False)
