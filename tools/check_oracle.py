"""Compares one of our models, and clipping, with a file of reference results.

  python -m tools.check_oracle FILE.npz

prints one JSON line. Of a captioner: {"loss", "encoder", "features", "grad_norm", "clipped_sum":
{strategy: ...}}; of a masked autoencoder: {"loss", "encoder", "prediction", "block_means",
"grad_norm", "clipped_sum": {strategy: ...}}, the last two with trained and with fixed positions.
Each is the largest error relative to the largest reference value, of the worst array where
there are several. The model runs in float32. Exits 2 if the file cannot be read.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import functools
import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dpcap.errors import UserError
from dpcap.models import MAE, Captioner
from dpcap.models.reference_weights import from_reference, to_reference
from dpcap.privacy import CLIPPING_STRATEGIES, clipped_sum
from tools.arguments import Parser, program

# Whole numbers in `meta`.
SHAPE_KEYS = (
  'patch_size',
  'width',
  'depth',
  'heads',
  'decoder_width',
  'decoder_depth',
  'decoder_heads',
)


class Oracle(dict):
  """The arrays of an oracle file by key; a missing key is the user's error."""

  def __missing__(self, key: str):
    raise UserError(f'oracle file: key {key!r} is missing')

  def under(self, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose key starts with `prefix`, under the rest of their key."""
    return {key.removeprefix(prefix): x for key, x in self.items() if key.startswith(prefix)}


def read_oracle(path: str) -> Oracle:
  """Reads an oracle file.

  Raises:
    UserError: if `path` is not a readable npz file.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      return Oracle(file)
  except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as e:
    raise UserError(f'oracle file {path!r} is not a readable npz file: {e}') from e


def oracle_model(oracle: Oracle) -> Captioner | MAE:
  """The float32 model that an oracle file describes; it is an MAE if it has a mask ratio.

  Raises:
    UserError: naming the key of the file that is missing or unfit.
  """
  text = str(oracle['meta'])
  try:
    meta = json.loads(text)
    if 'mask_ratio' in meta:
      kind, more = MAE, dict(mask_ratio=float(meta['mask_ratio']), train_positions=True)
    else:
      kind, more = Captioner, dict(vocab_size=int(meta['vocab_size']))
    return kind(**{key: int(meta[key]) for key in SHAPE_KEYS}, **more)
  except KeyError as e:
    raise UserError(f'oracle file: meta has no {e}') from e
  except (ValueError, TypeError) as e:
    raise UserError(
      f'oracle file: meta must be JSON with numbers {SHAPE_KEYS}, and vocab_size or mask_ratio: {e}'
    ) from e


def oracle_batch(oracle: Oracle, model: Captioner | MAE) -> dict[str, np.ndarray]:
  """The file's inputs by the names of the model's methods' arguments, channels last.

  'image' (B, H, W, 3) and, of a captioner, 'tokens' (B, L), of an MAE 'noise' (B, P).

  Raises:
    UserError: naming the input that is missing or of an unfit shape or type.
  """
  images, size = oracle['in/images'], model.patch_size
  if images.ndim != 4 or images.shape[1] != 3 or any(n % size for n in images.shape[2:]):
    raise UserError(
      f'oracle file: in/images has shape {images.shape}; it must be (B, 3, H, W), '
      f'H and W multiples of {size}'
    )
  batch = {'image': np.moveaxis(images, 1, -1)}
  if isinstance(model, Captioner):
    batch['tokens'] = tokens = oracle['in/tokens']
    if tokens.shape[:-1] != images.shape[:1] or tokens.dtype.kind not in 'iu':
      raise UserError(
        f'oracle file: in/tokens is {tokens.dtype} of shape {tokens.shape}; it must be whole '
        f'numbers ({len(images)}, L)'
      )
    return batch
  batch['noise'] = noise = oracle['in/mask_noise']
  shape = (len(images), images.shape[2] // size * (images.shape[3] // size))
  if noise.shape != shape or noise.dtype.kind != 'f':
    raise UserError(
      f'oracle file: in/mask_noise is {noise.dtype} of shape {noise.shape}; it must be floats '
      f'{shape}'
    )
  return batch


def oracle_errors(oracle: Oracle) -> dict[str, Any]:
  """The errors that this program prints, as a dict.

  Raises:
    UserError: naming the key of the file that is missing or unfit.
  """
  model = oracle_model(oracle)
  variables = from_reference(oracle.under('param/'), model)
  batch = oracle_batch(oracle, model)
  check = _captioner_errors if isinstance(model, Captioner) else _mae_errors
  # Accelerators would otherwise multiply float32 matrices in fewer bits.
  with jax.default_matmul_precision('highest'):
    return check(oracle, model, variables, batch)


def _captioner_errors(oracle, model, variables, batch) -> dict[str, Any]:
  @jax.jit
  def outputs(variables, image, tokens):
    return (
      model.apply(variables, image, tokens),
      model.apply(variables, image, method='encode'),
      model.apply(variables, image, method='features'),
    )

  def loss_fn(params, example):
    return model.apply({**variables, 'params': params}, example['image'], example['tokens'])

  name = lambda params: to_reference(params, model)
  names = ('loss', 'encoder', 'features')
  return {
    **_output_errors(oracle, names, outputs(variables, **batch)),
    **_clipping_errors(oracle, 'out/', loss_fn, variables['params'], batch, name),
  }


def _mae_errors(oracle, model, variables, batch) -> dict[str, Any]:
  @jax.jit
  def outputs(variables, image, noise):
    return (
      model.apply(variables, image, noise, method='loss'),
      model.apply(variables, image, noise, method='encode'),
      model.apply(variables, image, noise, method='paint')[0],
      model.apply(variables, image, layers='all_blocks', method='features'),
    )

  flat = flatten_dict(variables['params'])

  def loss_fn(trained, example):
    params = unflatten_dict(flat | flatten_dict(trained))
    return model.apply({'params': params}, example['image'], example['noise'], method='loss')

  def clipping_errors(prefix, trained, model):
    name = lambda params: to_reference(params, model)
    return _clipping_errors(oracle, prefix, loss_fn, unflatten_dict(trained), batch, name)

  but_positions = {path: x for path, x in flat.items() if path[-1] != 'positions'}
  one = clipping_errors('out/all/', flat, model)
  other = clipping_errors(
    'out/fixed_positions/', but_positions, model.clone(train_positions=False)
  )
  names = ('loss', 'encoder', 'prediction', 'block_means')
  return {
    **_output_errors(oracle, names, outputs(variables, **batch)),
    'grad_norm': _worst([one['grad_norm'], other['grad_norm']]),
    'clipped_sum': {
      strategy: _worst([error, other['clipped_sum'][strategy]])
      for strategy, error in one['clipped_sum'].items()
    },
  }


def _output_errors(
  oracle: Oracle, names: Sequence[str], outputs: Sequence[jax.Array]
) -> dict[str, float]:
  """Those of what the model computes, out/NAME each."""
  return {name: relative_error(x, oracle[f'out/{name}']) for name, x in zip(names, outputs)}


def _clipping_errors(
  oracle: Oracle, prefix: str, loss_fn, params, batch, name: Callable
) -> dict[str, Any]:
  """Those of gradient norms and clipped sums; `name` gives the params-shaped sum its names."""
  clip_norm = float(oracle[f'{prefix}clip_norm'])
  if not 0 < clip_norm < float('inf'):
    raise UserError(f'oracle file: {prefix}clip_norm={clip_norm} must be positive and finite')
  reference_sum = oracle.under(f'{prefix}clipped_sum/')
  clipped = {
    strategy: jax.jit(
      functools.partial(clipped_sum, loss_fn, clip_norm=clip_norm, strategy=strategy)
    )(params, batch, np.ones(len(batch['image']), bool))
    for strategy in CLIPPING_STRATEGIES
  }
  norms = oracle[f'{prefix}grad_norm']
  return {
    'grad_norm': _worst([relative_error(c.norms, norms) for c in clipped.values()]),
    'clipped_sum': {
      strategy: worst_error(name(c.sum), reference_sum) for strategy, c in clipped.items()
    },
  }


def relative_error(value: Any, reference: np.ndarray) -> float:
  """Largest absolute error over the largest absolute reference value; NaN if any is NaN."""
  value = np.asarray(value, np.float64)
  if value.shape != reference.shape:
    raise UserError(f'oracle file: an output has shape {reference.shape}; ours has {value.shape}')
  return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))


def worst_error(values: Mapping[str, Any], references: Mapping[str, np.ndarray]) -> float:
  """The largest `relative_error` over arrays by name, which must be the same names."""
  if different := sorted(values.keys() ^ references.keys()):
    raise UserError(f'oracle file: clipped_sum/{different[0]} is missing or unknown')
  return _worst([relative_error(values[name], references[name]) for name in values])


def _worst(errors: Sequence[float]) -> float:
  """The largest; NaN if any is NaN."""
  return float(np.max(errors))


@program
def main(argv: list[str] | None) -> None:
  """Compares with the file that the arguments name."""
  parser = Parser('tools.check_oracle', __doc__)
  parser.add_argument('file', help='an npz file in the layout that tools.make_oracle writes')
  print(json.dumps(oracle_errors(read_oracle(parser.parse_args(argv).file))))


if __name__ == '__main__':
  sys.exit(main())
