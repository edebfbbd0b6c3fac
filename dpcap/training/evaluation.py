"""Runs what `evals` of a config names, on checkpoints or in the middle of training."""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from dpcap import data, evals, models
from dpcap.errors import UserError
from dpcap.training import build, processes
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.metrics import write_whole
from dpcap.training.optimizer import make_optimizer
from dpcap.training.step import init_state
from dpcap.training.training_data import TrainingData
from dpcap.training.workdir import find_checkpoint

PyTree = Any


class Evaluations:
  """The evaluations of a config, for any parameters that its model can have.

  Attributes:
    untrained: {'params', 'frozen'} before the first step, on all devices of all processes.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self._config = config
    self._tokenizer = build.make_tokenizer(config)
    self._model = build.make_model(config, self._tokenizer.vocab_size)
    self._initial = init_state(
      self._model,
      make_optimizer(config.optimizer, config.train.steps),
      Layout(make_mesh()),
      build.make_transform(config, self._tokenizer).shapes,
      config.train.model_seed,
    )
    self.untrained = {'params': self._initial.params, 'frozen': self._initial.frozen}

  def restore(self, checkpoint: pathlib.Path) -> PyTree:
    """The variables that a checkpoint's directory holds.

    Raises:
      UserError: if they are those of another model.
    """
    checkpoints = Checkpoints(checkpoint.parent, read_only=True)
    variables = checkpoints.restore_model(int(checkpoint.name), self._initial)
    checkpoints.close()
    return variables

  def run(
    self, variables: PyTree, checkpoint: str, folder: pathlib.Path, cache: pathlib.Path
  ) -> dict[str, evals.Result]:
    """Evaluates and writes folder/NAME.json each; returns the results.

    Every process has a share of the images. Each file says whether its evaluation read, or may have
    read, the training data (`uses_training_data`), which puts it outside the guarantee; all others
    follow from a released model.

    Args:
      variables: {'params', 'frozen'}, whole on all devices.
      checkpoint: the directory that holds them, WORKDIR/checkpoints/STEP of the run that made it.
      folder: created if need be.
      cache: folder where features are kept, for other evaluations and later ones.

    Raises:
      UserError: if an evaluator refuses its data, or the folder cannot be written.
    """
    config = self._config
    make_subject = functools.partial(
      evals.Subject,
      # To scan blocks is for compiling the training step; evaluations look into blocks.
      model=self._model.clone(
        **{name: False for name in ('scan_blocks', 'remat') if hasattr(self._model, name)}
      ),
      variables=_on_this_process(variables),
      untrained=_on_this_process(self.untrained),
      transform=build.make_view(config, self._tokenizer),
      workers=config.data.workers,
      cache=cache,
    )
    results, training_data = {}, TrainingData(checkpoint)
    for name, entry in config.evals.items():
      options = entry.to_dict()
      evaluator, apart = options.pop('name'), options.pop('apart')
      read = []
      subject = make_subject(make_source=_noting(read, config), note=read.append)
      results[name] = evals.EVALUATORS[evaluator].evaluate(subject, **options)
      if processes.is_main():
        verdict = training_data.judge(read, apart)
        about = {
          'checkpoint': checkpoint,
          'evaluator': evaluator,
          'options': options,
          'uses_training_data': verdict.uses_training_data,
          'apart': {'declared': verdict.declared, 'why': verdict.why},
          'fingerprints': list(dict.fromkeys(source.fingerprint for source in read)),
        }
        _write(folder / f'{name}.json', name, results[name], about)
    return results


def _noting(
  read: list[data.Source], config: ml_collections.ConfigDict
) -> Callable[[Any], data.Source]:
  """Makes sources from their sections, and adds them to `read`."""

  def make_source(section):
    read.append(build.make_source(config, section))
    return read[-1]

  return make_source


def _on_this_process(variables: PyTree) -> PyTree:
  """Unstacked, whole on every device of this process alone."""
  sharding = Layout(make_mesh(1, jax.local_devices())).whole()
  return jax.device_put(models.unstack_blocks(jax.tree.map(np.asarray, variables)), sharding)


def _write(path: pathlib.Path, name: str, result: evals.Result, about: dict[str, Any]) -> None:
  head = {'name': name, 'metric': result.metric, 'value': result.value, 'n': result.n, **about}
  # No detail of an evaluator may stand for what is said about it here.
  record = _finite({**head, **result.details, **head})
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, allow_nan=False) + '\n'
    # Its name does not say that it may hold captions of the training data.
    write_whole(path, text, private=about['uses_training_data'])
  except OSError as e:
    raise UserError(f'{path}: cannot be written ({e.strerror})') from e


def _finite(tree: Any) -> Any:
  """The same with None for NaN and infinities, which JSON lacks; a diverged model has such."""
  if isinstance(tree, dict):
    return {key: _finite(value) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_finite(value) for value in tree]
  return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def restore(
  evaluations: Evaluations, named: str | None, workdir: pathlib.Path
) -> tuple[pathlib.Path, Any]:
  """The checkpoint to evaluate and its variables.

  A run that goes on beside this may remove its newest checkpoint for a newer one, while it is read.

  Args:
    evaluations: whose model it is.
    named: a checkpoint's directory or a workdir, or None for the newest of `workdir`.
    workdir: of the run.

  Raises:
    UserError: if there is none, or it cannot be restored.
  """
  place = pathlib.Path(named) if named else workdir
  find = lambda: pathlib.Path(processes.from_main(lambda: str(find_checkpoint(place))))
  checkpoint = find()
  while True:
    error = None
    try:
      variables = evaluations.restore(checkpoint)
    except UserError as e:
      error = e
    if not processes.gather(np.array([error is not None])).any():
      return checkpoint, variables
    tried, checkpoint = checkpoint, find()
    if tried == checkpoint:
      raise error or UserError(f'{checkpoint}: another process cannot read it')
