"""Evaluates a checkpoint.

    python -m dpcap.evaluate --config=configs/Y.py[:argument] --workdir=DIR [--config.checkpoint=DIR]

Runs what the section `evals` of the config names and writes DIR/evals/NAME.json each. The
checkpoint is the newest of the workdir, or the one that `checkpoint` names.
"""

import functools
import json
import pathlib
from typing import Any

import ml_collections
from absl import flags

from dpcap import command_line, data, evals, models
from dpcap.errors import UserError
from dpcap.evals import table
from dpcap.training import build
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.optimizer import make_optimizer
from dpcap.training.step import init_state

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'The run; results go to its folder evals.')


def main() -> None:
  """Reads the config, evaluates, writes and shows the results."""
  config = command_line.load_config(_CONFIG)
  if not _WORKDIR.value:
    raise UserError('--workdir is missing; give the directory of the run')
  if not config.evals:
    raise UserError('the config has no evals; name at least one evaluator')
  workdir = pathlib.Path(_WORKDIR.value)
  checkpoint = find_checkpoint(config.checkpoint, workdir)
  subject = make_subject(config, checkpoint)
  results = {}
  for name, entry in config.evals.items():
    options = entry.to_dict()
    evaluator = evals.EVALUATORS[options.pop('name')]
    results[name] = evaluator(subject, **options)
    about = {
      'options': options,
      'uses_training_data': any(_same_records(option, config) for option in options.values()),
    }
    write_result(workdir, name, results[name], about, checkpoint)
  table.show(results)


def _same_records(option: Any, config: ml_collections.ConfigDict) -> bool:
  """Whether an evaluator's option is the source that the model was trained on."""
  if not isinstance(option, dict):
    return False
  ignored = ('label', 'label_key', 'index_dir')
  bare = lambda source: {k: v for k, v in source.items() if k not in ignored}
  return bare(option) == bare(config.data.source.to_dict())


def find_checkpoint(named: str | None, workdir: pathlib.Path) -> pathlib.Path:
  """The checkpoint to evaluate: the one named, or the newest of the workdir.

  Raises:
    UserError: if there is none.
  """
  if named:
    path = pathlib.Path(named)
    if not path.is_dir() or not path.name.isdigit():
      raise UserError(
        f'checkpoint is {named}; it must be a directory such as WORKDIR/checkpoints/1000'
      )
    return path
  steps = [int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit()]
  if not steps:
    raise UserError(f'{workdir}/checkpoints: holds no checkpoint; train first')
  return workdir / 'checkpoints' / str(max(steps))


def make_subject(config, checkpoint: pathlib.Path) -> evals.Subject:
  """The model of `config` with the parameters of `checkpoint`.

  Raises:
    UserError: if the checkpoint holds another model.
  """
  tokenizer = build.make_tokenizer(config)
  model = build.make_model(config, tokenizer.vocab_size)
  optimizer = make_optimizer(config.optimizer, config.train.steps)
  fresh = init_state(
    model,
    optimizer,
    Layout(make_mesh()),
    config.data.image_size,
    config.data.text_length,
    config.train.model_seed,
  )
  checkpoints = Checkpoints(checkpoint.parent, read_only=True)
  variables = checkpoints.restore_model(int(checkpoint.name), fresh)
  checkpoints.close()
  untrained = {'params': fresh.params, 'frozen': fresh.frozen}
  transform = data.Transform(config.data.image_size, config.data.text_length, tokenizer)
  return evals.Subject(
    # To scan blocks is for compiling the training step; evaluations look into blocks.
    model=model.clone(scan_blocks=False, remat=False),
    variables=models.unstack_blocks(variables),
    untrained=models.unstack_blocks(untrained),
    transform=transform,
    make_source=functools.partial(build.make_source, config),
    workers=config.data.workers,
  )


def write_result(
  workdir: pathlib.Path,
  name: str,
  result: evals.Result,
  about: dict[str, Any],
  checkpoint: pathlib.Path,
) -> None:
  """Writes evals/NAME.json, with what is to be known about the evaluation.

  Raises:
    UserError: if the workdir cannot be written.
  """
  path = workdir / 'evals' / f'{name}.json'
  record = {
    'name': name,
    'metric': result.metric,
    'value': result.value,
    'n': result.n,
    'checkpoint': str(checkpoint),
    **about,
    **result.details,
  }
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + '\n')
  except OSError as e:
    raise UserError(f'{path}: cannot be written ({e.strerror})') from e


if __name__ == '__main__':
  command_line.run(main)
