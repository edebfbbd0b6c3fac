"""Checkpoints: written in the background, kept by policy, each with its privacy statement.

A checkpoint has three items: `model` (params and frozen, what is released), `training`
(step and optimizer state) and `privacy` (the statement, as JSON, with the mark of the keys that it
goes on with: `KeyStore.mark`). Orbax writes to a
temporary name and renames at the end: one that was cut off is never picked up.
"""

import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpcap.errors import UserError
from dpcap.training import processes
from dpcap.training.damage import damage_of_arrays, whole
from dpcap.training.step import TrainState


class Checkpoints:
  """The checkpoints of a run, by step.

  Raises:
    UserError: if the directory cannot be used.
  """

  def __init__(
    self, directory: str | os.PathLike, keep: int | None = None, read_only: bool = False
  ):
    """Opens, and creates where needed, `directory`; keeps the latest `keep` checkpoints.

    With `read_only` nothing is created or cleaned up: a run may be writing there.
    """
    self._directory = pathlib.Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=not read_only,
      cleanup_tmp_directories=not read_only,
    )
    try:
      self._manager = ocp.CheckpointManager(self._directory, options=options)
    except OSError as e:
      raise UserError(f'{self._directory}: cannot hold checkpoints ({e})') from e

  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint, None if there is none."""
    return self._manager.latest_step()

  def path(self, step: int) -> str:
    """Directory of one checkpoint."""
    return str(self._directory / str(step))

  def save(self, state: TrainState, statement: dict) -> None:
    """Starts writing; returns once the arrays are copied out of the device.

    Raises:
      UserError: if this or the previous write fails, for example on a full disk.
    """
    # Arrays, and some room for what describes them.
    needed = 1.1 * sum(x.nbytes for x in jax.tree.leaves(state)) + 2**20
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      raise UserError(
        f'{self._directory}: the disk is full: a checkpoint takes up to {needed / 2**20:,.1f} MiB,'
        f' {free / 2**20:,.1f} MiB are free; make room, then the same command goes on'
      )
    items = ocp.args.Composite(
      model=ocp.args.StandardSave(state.variables),
      training=ocp.args.StandardSave(_beside_the_model(state)),
      privacy=ocp.args.JsonSave(statement),
    )
    self._guarded(lambda: self._manager.save(int(state.step), args=items, force=True))

  def wait(self) -> None:
    """Returns when everything is on disk; raises UserError if it can't be written."""
    self._guarded(self._manager.wait_until_finished)

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state of a checkpoint, shaped and placed as `like`.

    Raises:
      UserError: if the checkpoint holds another model.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      model=ocp.args.StandardRestore(target.variables),
      training=ocp.args.StandardRestore(_beside_the_model(target)),
    )
    restored = self._restore(step, items)
    model = restored.model['params']
    average = None if like.average is None else model
    return TrainState(
      **{'params': model} | restored.training, frozen=restored.model['frozen'], average=average
    )

  def restore_model(self, step: int, like: TrainState) -> dict:
    """Only {'params', 'frozen'} of a checkpoint, as `like`.

    Raises:
      UserError: if the checkpoint holds another model.
    """
    target = jax.tree.map(
      ocp.utils.to_shape_dtype_struct, {'params': like.params, 'frozen': like.frozen}
    )
    return self._restore(step, ocp.args.Composite(model=ocp.args.StandardRestore(target))).model

  def close(self) -> None:
    """Waits for what is being written and lets go of the directory."""
    self.wait()
    self._manager.close()

  def _restore(self, step, items):
    try:
      return self._manager.restore(step, args=items)
    except Exception as e:  # pylint: disable=broad-except
      # Orbax raises Exception itself where an array cannot be read.
      if processes.is_loss(e):
        raise
      path = pathlib.Path(self.path(step))
      _refuse_damaged(path, e)
      raise UserError(
        f'{path}: cannot be restored as the model of this config ({_first_line(e)})'
      ) from e

  def _guarded(self, write):
    try:
      write()
    # Orbax and TensorStore report a full disk as one or the other.
    except (OSError, ValueError, RuntimeError) as e:
      if processes.is_loss(e):
        raise
      raise UserError(
        f'{self._directory}: a checkpoint cannot be written ({_first_line(e)})'
      ) from e


def _beside_the_model(state: TrainState) -> dict:
  """What only going on with a run needs; of an averaged one, the parameters as they are."""
  items = {'step': state.step, 'opt_state': state.opt_state}
  return items if state.average is None else items | {'params': state.params}


def read_model(checkpoint: pathlib.Path) -> dict:
  """{'params', 'frozen'} of a checkpoint's directory, of whatever model, as numpy arrays.

  Raises:
    UserError: if it cannot be read.
  """
  path, handler = checkpoint.absolute() / 'model', ocp.StandardCheckpointHandler()
  try:
    like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), handler.metadata(path).tree)
    return ocp.Checkpointer(handler).restore(path, args=ocp.args.StandardRestore(like))
  except Exception as e:  # pylint: disable=broad-except
    if processes.is_loss(e):
      raise
    _refuse_damaged(checkpoint, e)
    raise UserError(f'{checkpoint}: cannot be read ({_first_line(e)})') from e


def _refuse_damaged(path: pathlib.Path, error: Exception) -> None:
  """Says what a checkpoint lacks, if that is why it cannot be read."""
  if why := damage_of_arrays(path):
    others = whole(path.parent, but=path)
    raise UserError(f'{path}: not whole ({why}); whole ones beside it: {others}') from error


def _first_line(error: Exception) -> str:
  return str(error).partition('\n')[0][:300] or type(error).__name__
