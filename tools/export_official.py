"""Turns a checkpoint of this project into a file of the reference implementation's weights.

    python -m tools.export_official CHECKPOINT OUT.safetensors

CHECKPOINT is a workdir (its newest checkpoint) or WORKDIR/checkpoints/STEP, of a captioner or an
MAE; which one is read from WORKDIR/config.json. OUT holds what the reference model's
`load_state_dict(strict=True)` asks for, under its names: all that is trained and the frozen tensors
that are used, bit for bit as the checkpoint has them; position embeddings, which we compute; and
what DP-Cap never uses as zeros. In PyTorch, with a captioner made with `text_max_length` =
data.text_length:

    model.load_state_dict(safetensors.torch.load_file('OUT.safetensors'))

tools.import_official reads it back exactly.

Prints one JSON line: {"model", "arrays", "bytes", "sha256"}. Exits 2 if CHECKPOINT or OUT is
refused.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import json
import pathlib
import sys
from typing import Any

from dpcap import models
from dpcap.errors import UserError
from dpcap.models import official, weight_files
from dpcap.training.checkpoints import read_model
from dpcap.training.workdir import find_checkpoint
from tools.arguments import Parser, program


def export_official(checkpoint: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
  """Writes `out`; returns what the program prints.

  Raises:
    UserError: if either is refused.
  """
  found = find_checkpoint(checkpoint)
  config = _read_config(found.resolve().parents[1] / 'config.json')
  variables = models.unstack_blocks(read_model(found))
  arrays = official.to_official(
    variables, config['model'], config['data']['image_size'], config['data']['text_length']
  )
  weight_files.save_weights(out, arrays)
  return {
    'model': config['model']['name'],
    'arrays': len(arrays),
    'bytes': out.stat().st_size,
    'sha256': weight_files.sha256(out),
  }


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
    return {section: dict(config[section]) for section in ('model', 'data')}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path}: not the config of a run ({e!r})') from e


@program
def main(argv: list[str] | None) -> None:
  """Exports what the arguments name."""
  parser = Parser('tools.export_official', __doc__)
  parser.add_argument('checkpoint', metavar='CHECKPOINT', type=pathlib.Path)
  parser.add_argument('out', metavar='OUT.safetensors', type=pathlib.Path)
  options = parser.parse_args(argv)
  print(json.dumps(export_official(options.checkpoint, options.out)))


if __name__ == '__main__':
  sys.exit(main())
