"""Runs what `evals` of a config names, on checkpoints or in the middle of training."""

import functools
import json
import pathlib
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
      config.data.image_size,
      config.data.text_length,
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

    Every process has a share of the images. Each file says whether its evaluation read the
    training data (`uses_training_data`), which puts it outside the guarantee; all others follow
    from a released model.

    Args:
      variables: {'params', 'frozen'}, whole on all devices.
      checkpoint: the directory that holds them.
      folder: created if need be.
      cache: folder where features are kept, for other evaluations and later ones.

    Raises:
      UserError: if an evaluator refuses its data, or the folder cannot be written.
    """
    config = self._config
    subject = evals.Subject(
      # To scan blocks is for compiling the training step; evaluations look into blocks.
      model=self._model.clone(scan_blocks=False, remat=False),
      variables=_on_this_process(variables),
      untrained=_on_this_process(self.untrained),
      transform=data.Transform(config.data.image_size, config.data.text_length, self._tokenizer),
      make_source=functools.partial(build.make_source, config),
      workers=config.data.workers,
      cache=cache,
    )
    results = {}
    for name, entry in config.evals.items():
      options = entry.to_dict()
      evaluator = options.pop('name')
      results[name] = evals.EVALUATORS[evaluator](subject, **options)
      if processes.is_main():
        about = {
          'checkpoint': checkpoint,
          'evaluator': evaluator,
          'options': options,
          'uses_training_data': any(_same_records(option, config) for option in options.values()),
        }
        _write(folder / f'{name}.json', name, results[name], about)
    return results


def _on_this_process(variables: PyTree) -> PyTree:
  """Unstacked, whole on every device of this process alone."""
  sharding = Layout(make_mesh(1, jax.local_devices())).whole()
  return jax.device_put(models.unstack_blocks(jax.tree.map(np.asarray, variables)), sharding)


def _same_records(option: Any, config: ml_collections.ConfigDict) -> bool:
  """Whether an evaluator's option is the source that the model was trained on."""
  if not isinstance(option, dict):
    return False
  ignored = ('label', 'label_key', 'index_dir')
  bare = lambda source: {k: v for k, v in source.items() if k not in ignored}
  return bare(option) == bare(config.data.source.to_dict())


def _write(path: pathlib.Path, name: str, result: evals.Result, about: dict[str, Any]) -> None:
  head = {'name': name, 'metric': result.metric, 'value': result.value, 'n': result.n}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**head, **about, **result.details}, indent=2) + '\n')
  except OSError as e:
    raise UserError(f'{path}: cannot be written ({e.strerror})') from e
