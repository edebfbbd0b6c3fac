"""Where a run's parameters begin: `train.init` names weights to start from.

They are a checkpoint of this project, whatever model it is of, or an official file. All of them are
taken, or some top-level modules, as the encoder of a model that was trained in another way. Names
and shapes must be the same; the optimizer starts fresh.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dpcap import models, privacy
from dpcap.errors import UserError
from dpcap.models import official
from dpcap.training import processes
from dpcap.training.checkpoints import read_model
from dpcap.training.step import TrainState
from dpcap.training.workdir import find_checkpoint, read_statement

# What stands for all modules in `train.init_parts`.
ALL = 'all'

PyTree = Any


class Weights(NamedTuple):
  """What a run can start from.

  Attributes:
    path: the checkpoint or file that holds them.
    arrays: by name 'module/.../array', trained and frozen ones, blocks unrolled.
    statement: what they were trained on.
  """

  path: str
  arrays: dict[str, np.ndarray]
  statement: dict[str, Any]


class Start(NamedTuple):
  """How a run started.

  Attributes:
    state: before its first step.
    record: for its statement (`privacy.make_start`).
    said: what was taken and what was not, for people.
  """

  state: TrainState
  record: dict[str, Any]
  said: str


def start_from(path: str, parts: Sequence[str], state: TrainState) -> Start:
  """Takes parameters and frozen tensors from `path`.

  Args:
    path: a checkpoint's directory, a workdir (its newest checkpoint) or an official file.
    parts: ('all',) or names of top-level modules of the run's model.
    state: as the run starts without: what is not taken stays.

  Raises:
    UserError: naming what cannot be read, or the first array that differs.
  """
  weights = read_weights(path)
  ours = {'params': state.params, 'frozen': state.frozen}
  modules = sorted({name for tree in ours.values() for name in tree})
  taken = modules if list(parts) == [ALL] else list(parts)
  for part in taken:
    if part not in modules:
      raise UserError(
        f'train.init_parts holds {part!r}; allowed: {ALL!r} alone, or some of {", ".join(modules)}'
      )
  shapes = _flat(jax.eval_shape(models.unstack_blocks, ours))
  _check(weights, {name: x.shape for name, x in shapes.items()}, taken)

  new = {}
  for collection, tree in ours.items():
    names = [n for n in flatten_dict(jax.eval_shape(models.unstack_blocks, tree), sep='/')]
    chosen = {name: weights.arrays[name] for name in names if _module(name) in taken}
    like = {name: tree[name] for name in tree if name in taken}
    stacked = models.stack_blocks(unflatten_dict(chosen, sep='/'), like)
    new[collection] = {**tree, **jax.tree.map(_place, stacked, like)}

  state = state._replace(params=new['params'], frozen=new['frozen'])
  if state.average is not None:
    layout = jax.tree.map(lambda x: x.sharding, state.average)
    state = state._replace(average=jax.jit(lambda x: x, out_shardings=layout)(new['params']))
  record = privacy.make_start(weights.path, parts, weights.statement)
  count = sum(int(np.prod(x.shape)) for name, x in shapes.items() if _module(name) in taken)
  left = [name for name in modules if name not in taken]
  others = sorted({_module(name) for name in weights.arrays} - set(taken))
  said = f'starts from {weights.path}: {", ".join(taken)} ({count:,} numbers)'
  said += f'; from train.model_seed: {", ".join(left)}' if left else ''
  said += f'; not taken: {", ".join(others)}' if others else ''
  return Start(state, record, said)


def read_weights(path: str) -> Weights:
  """The weights at `path`: see `start_from`.

  Raises:
    UserError: if they cannot be read.
  """
  try:
    if official.is_official(path):
      read = official.read_official(path)
      statement = privacy.foreign_statement(read.name, read.sha256, read.claims)
      return Weights(path, _flat(read.variables), statement)
    # One that goes on meanwhile may have a newer one for the next process that looks.
    checkpoint = pathlib.Path(processes.from_main(lambda: str(find_checkpoint(pathlib.Path(path)))))
    variables = models.unstack_blocks(read_model(checkpoint))
    return Weights(str(checkpoint), _flat(variables), read_statement(checkpoint))
  except UserError as e:
    raise UserError(f'train.init: {e}') from e


def _check(weights: Weights, shapes: dict[str, tuple], taken: Iterable[str]) -> None:
  """Refuses weights that are not, in the modules that are taken, those of the run's model."""
  for name in sorted(shapes.keys() | weights.arrays.keys()):
    if _module(name) not in taken:
      continue
    if name not in weights.arrays:
      raise UserError(f'train.init: {weights.path} has no {name!r}, which this model needs')
    if name not in shapes:
      raise UserError(f'train.init: {weights.path} has {name!r}, which this model lacks')
    if weights.arrays[name].shape != shapes[name]:
      raise UserError(
        f'train.init: {weights.path} has {name!r} of shape {weights.arrays[name].shape}; this model'
        f' needs {shapes[name]}'
      )


def _flat(variables: PyTree) -> dict[str, Any]:
  """Arrays by name, whether trained or not: what one model trains another may keep fixed."""
  return {
    name: x for tree in variables.values() for name, x in flatten_dict(tree, sep='/').items()
  }


def _module(name: str) -> str:
  return name.partition('/')[0]


def _place(array: np.ndarray, like: jax.Array) -> jax.Array:
  """The array, which every process has, laid out as `like`."""
  array = np.asarray(array, like.dtype)
  return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
