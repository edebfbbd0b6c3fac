"""Batches through the model on all devices: each process has a share, all get every answer."""

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpcap import data
from dpcap.evals.progress import track
from dpcap.evals.subject import Subject


def each(
  subject: Subject,
  title: str,
  batches: Sequence[Any],
  compute: Callable[[Any], Any],
  start: int = 0,
) -> Iterator[Any]:
  """Yields `compute(batch)` for all batches in order, the same on every process.

  Of n processes, each loads and computes every n-th batch.

  Args:
    subject: the model under evaluation.
    title: of the progress bar.
    batches: random access to batches, of records of their `source`.
    compute: from a batch to what is wanted of it, a small thing of numpy arrays, lists, strings.
    start: the first batch.
  """
  subject.note(batches.source)
  count, index = jax.process_count(), jax.process_index()
  mine = data.iterate(data.EveryNth(batches, count, start + index), 0, subject.workers)
  with contextlib.closing(mine):
    rounds = range(start, len(batches), count)
    for first in track(title, rounds, len(rounds)):
      answer = compute(next(mine)) if first + index < len(batches) else None
      yield from exchange(answer)[: len(batches) - first]


def spread(array: np.ndarray, size: int) -> jax.Array:
  """`array` (B, ...) over this process's devices, filled up: one shape for all batches.

  Args:
    array: of `size` rows or fewer.
    size: rows of a whole batch; rounded up so that devices have equally many.

  Returns:
    (at least size, ...); rows from B on are zero.
  """
  devices = jax.local_devices()
  rows = -(-size // len(devices)) * len(devices)
  filled = np.zeros((rows, *array.shape[1:]), array.dtype)
  filled[: len(array)] = array
  return jax.device_put(filled, NamedSharding(Mesh(devices, 'batch'), PartitionSpec('batch')))


def exchange(answer: Any) -> list[Any]:
  """The answers of all processes, on all of them."""
  if jax.process_count() == 1:
    return [answer]
  packed = np.frombuffer(pickle.dumps(answer), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(packed)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(packed)] = packed
  # Only processes of this run are asked, so that what comes back may be unpickled.
  return [
    pickle.loads(row[:size].tobytes())
    for row, size in zip(multihost_utils.process_allgather(padded), sizes)
  ]
