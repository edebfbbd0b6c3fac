"""Many processes as one run: how they find each other, agree, and end together.

Every process runs the same program on its own devices. What only one may do (keys, ledger,
statement, metrics, screen) the main one does. Launchers say what is to be started by the
environment:

| variable                                                       | set by                      |
| -------------------------------------------------------------- | --------------------------- |
| JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID      | launchers that know all three |
| DPCAP_MULTIHOST=1: JAX finds them out (Slurm, Cloud TPU, GKE) | all other launchers          |
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpcap.ending import LOST
from dpcap.errors import UserError

# The others of a process that dies know of it after this time at most.
HEARTBEAT_SECONDS = 30

# What carries arrays between processes, as its errors name it: on CPU, on GPU.
_TRANSPORTS = ('Gloo', 'NCCL')

_NAMES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def initialize() -> None:
  """Joins the other processes, if the environment says that there are any.

  Raises:
    UserError: if what the environment says is incomplete, or the others do not come.
  """
  given = [name for name in _NAMES if os.environ.get(name)]
  automatic = os.environ.get('DPCAP_MULTIHOST') == '1'
  if not given and not automatic:
    return
  arguments = {}
  if not automatic:
    if len(given) < len(_NAMES):
      missing = ', '.join(name for name in _NAMES if name not in given)
      raise UserError(f'{missing} not set, but {", ".join(given)} is; set all three or none')
    address, count, index = (os.environ[name] for name in _NAMES)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
      raise UserError(
        f'JAX_PROCESS_ID is {index!r} and JAX_NUM_PROCESSES {count!r}; they must be whole'
        ' numbers, the first below the second'
      )
    if int(count) == 1:
      return
    arguments = dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
  try:
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    # Devices that first meet wait 30 s for each other and no longer; once they are connected, as
    # long as it takes: for a slow record, or for a process that compiles what others had cached.
    connect(Mesh(jax.devices(), ('all',)))
    gather(np.zeros(1, np.int32))
  except (ValueError, RuntimeError) as e:
    raise UserError(f'the processes of this run cannot find each other ({e})') from e


def connect(mesh: Mesh) -> None:
  """Connects the devices of each axis of a mesh, which all processes call at the same time."""
  for axis in (name for name in mesh.axis_names if mesh.shape[name] > 1):
    add = functools.partial(jax.lax.psum, axis_name=axis)
    total = jax.shard_map(add, mesh=mesh, in_specs=P(axis), out_specs=P())
    jax.block_until_ready(jax.jit(total)(np.ones(mesh.shape[axis], np.float32)))


def is_main() -> bool:
  """Whether this process does what only one may do."""
  return jax.process_index() == 0


def from_main(function: Callable[[], Any]) -> Any:
  """What `function()` returns on the main process (a JSON value), on all of them.

  Raises:
    UserError: on all of them, if the function raises it.
  """
  if jax.process_count() == 1:
    return function()
  answer = b''
  if is_main():
    try:
      answer = json.dumps({'value': function()}).encode()
    except UserError as e:
      answer = json.dumps({'error': str(e)}).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
  buffer = np.zeros(size, np.int32)
  if is_main():
    buffer[:] = np.frombuffer(answer, np.uint8)
  buffer = np.asarray(multihost_utils.broadcast_one_to_all(buffer))
  answer = json.loads(buffer.astype(np.uint8).tobytes())
  if 'error' in answer:
    raise UserError(answer['error'])
  return answer['value']


def gather(values: np.ndarray) -> np.ndarray:
  """(processes, ...): the arrays of all processes, which have the same shape and type."""
  if jax.process_count() == 1:
    return values[None]
  return np.asarray(multihost_utils.process_allgather(values))


def stop_is_due(requests: list[int], moment: int) -> bool:
  """Whether all processes stop at this moment of the run; `moment` rises by one a call.

  One process does as `requests` say. Many agree on a moment once any of them got SIGTERM
  or its machine's notice of preemption; without JAX's service for that they ask each other.
  """
  if jax.process_count() == 1:
    return bool(requests)
  if notices_are_passed_on():
    return multihost_utils.reached_preemption_sync_point(moment)
  return bool(gather(np.array([bool(requests)])).any())


def notices_are_passed_on() -> bool:
  """Whether JAX takes SIGTERM to one process of many for a notice to all of them."""
  return jax.process_count() > 1 and bool(jax.config.jax_enable_preemption_service)


def is_loss(error: Exception) -> bool:
  """Whether an error is what this process sees of another one's death."""
  kinds = (jax.errors.JaxRuntimeError, TimeoutError)
  # Reading an array that the dead one had a part in raises ValueError.
  lost = isinstance(error, kinds) or any(name in str(error) for name in _TRANSPORTS)
  return jax.process_count() > 1 and lost


@contextlib.contextmanager
def end_together():
  """Ends this process at once, with one line, where another one of the run has died.

  A clean end would wait for the dead one.
  """
  try:
    yield
  except Exception as e:
    if not is_loss(e):
      raise
    reason = str(e).partition('\n')[0][:200]
    what = 'waited too long for' if 'DEADLINE_EXCEEDED' in reason else 'lost'
    print(
      f'error: process {jax.process_index()} {what} another process of this run ({reason}); all'
      ' stop, the same command on all of them goes on from the last checkpoint',
      file=sys.stderr,
      flush=True,
    )
    os._exit(LOST)
