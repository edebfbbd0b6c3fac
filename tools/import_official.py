"""Turns a checkpoint of the reference implementation into one of this project.

    python -m tools.import_official FILE OUT

FILE is a .safetensors, an .npz or a .pth (for which torch must be installed) of
facebookresearch/dpcap or, encoder and decoder, of facebookresearch/ViP-MAE; its weights stand in an
entry "model" or bare. Which model it is for is told by the names and shapes in it. OUT becomes a
workdir without a run: config.json, privacy.json and checkpoints/0, so that

    python -m dpcap.evaluate --config=... --workdir=DIR --config.checkpoint=OUT

evaluates it. The statement says that nothing is vouched for, the file's SHA-256, and what a
publisher claims of a file of that name. Every array must be there, under its name and of its shape;
position embeddings must be those that our model computes (of an MAE they may have been trained:
then they are parameters); what DP-Cap never uses is left out.

Prints one JSON line: {"model": {...}, "image_size", "text_length", "vocab_size", "parameters",
"sha256", "checkpoint"}: what the config of an evaluation must have; null where the model reads no
text. Exits 2 if FILE or OUT is refused.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import json
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from dpcap import config as config_lib
from dpcap import privacy
from dpcap.errors import UserError
from dpcap.models.official import Description, OfficialFile, read_official
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.step import TrainState
from dpcap.training.workdir import publish_statement, write_whole
from tools.arguments import Parser, program


def import_official(file: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
  """Writes `out`; returns what the program prints.

  Raises:
    UserError: if either is refused.
  """
  read = read_official(file)
  checkpoint = _write(out, read)
  return {
    **read.description._asdict(),
    'parameters': sum(x.size for x in jax.tree.leaves(read.variables['params'])),
    'sha256': read.sha256,
    'checkpoint': checkpoint,
  }


def _write(out: pathlib.Path, read: OfficialFile) -> str:
  """Config, checkpoint and statement; returns the checkpoint's directory."""
  config = config_lib.to_json(_config(read.description)) + '\n'
  try:
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
      raise UserError(f'{out}: is not empty; give a new directory')
    write_whole(out / 'config.json', config)
  except OSError as e:
    raise UserError(f'{out}: cannot be written ({e.strerror})') from e
  checkpoints = Checkpoints(out / 'checkpoints')
  params, frozen = read.variables['params'], read.variables['frozen']
  # No optimizer comes with it, and no step of ours made it.
  state = TrainState(step=np.zeros((), np.int32), params=params, frozen=frozen, opt_state=())
  checkpoints.save(state, privacy.foreign_statement(read.name, read.sha256, read.claims))
  checkpoints.close()
  publish_statement(out)
  return checkpoints.path(0)


def _config(description: Description) -> ml_collections.ConfigDict:
  """What is known: the model, and what it reads."""
  config = config_lib.base_config()
  config.model = config_lib.model_config(**description.model)
  config.data.image_size = description.image_size
  if description.text_length is not None:
    config.data.text_length = description.text_length
    config.data.tokenizer = 'wordpiece'
  return config


@program
def main(argv: list[str] | None) -> None:
  """Imports what the arguments name."""
  parser = Parser('tools.import_official', __doc__)
  parser.add_argument('file', metavar='FILE', type=pathlib.Path)
  parser.add_argument('out', metavar='OUT', type=pathlib.Path)
  options = parser.parse_args(argv)
  print(json.dumps(import_official(options.file, options.out)))


if __name__ == '__main__':
  sys.exit(main())
