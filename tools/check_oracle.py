"""Compares our captioner and clipping with a file of reference results.

  python -m tools.check_oracle FILE.npz

prints one JSON line {"loss", "encoder", "features", "grad_norm", "clipped_sum": {strategy: ...}}:
each the largest error relative to the largest reference value, of the worst array where
there are several. The model runs in float32. Exits 2 if the file cannot be read.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import functools
import json
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpcap.errors import UserError
from dpcap.models import Captioner
from dpcap.models.reference_weights import from_reference, to_reference
from dpcap.privacy import CLIPPING_STRATEGIES, clipped_sum

MODEL_KEYS = (
  'vocab_size',
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


def oracle_model(oracle: Oracle) -> Captioner:
  """The float32 captioner that an oracle file describes.

  Raises:
    UserError: naming the key of the file that is missing or unfit.
  """
  text = str(oracle['meta'])
  try:
    meta = json.loads(text)
    return Captioner(**{key: int(meta[key]) for key in MODEL_KEYS})
  except KeyError as e:
    raise UserError(f'oracle file: meta has no {e}') from e
  except (ValueError, TypeError) as e:
    raise UserError(f'oracle file: meta must be JSON with whole numbers {MODEL_KEYS}: {e}') from e


def oracle_batch(oracle: Oracle, patch_size: int) -> dict[str, np.ndarray]:
  """The file's inputs as the model takes them: 'image' (B, H, W, 3), 'tokens' (B, L).

  Raises:
    UserError: naming the input that is missing or of an unfit shape or type.
  """
  images, tokens = oracle['in/images'], oracle['in/tokens']
  if images.ndim != 4 or images.shape[1] != 3 or any(n % patch_size for n in images.shape[2:]):
    raise UserError(
      f'oracle file: in/images has shape {images.shape}; it must be (B, 3, H, W), '
      f'H and W multiples of {patch_size}'
    )
  if tokens.shape[:-1] != images.shape[:1] or tokens.dtype.kind not in 'iu':
    raise UserError(
      f'oracle file: in/tokens is {tokens.dtype} of shape {tokens.shape}; it must be whole '
      f'numbers ({len(images)}, L)'
    )
  return {'image': np.moveaxis(images, 1, -1), 'tokens': tokens}


def oracle_errors(oracle: Oracle) -> dict[str, Any]:
  """The errors that this program prints, as a dict.

  Raises:
    UserError: naming the key of the file that is missing or unfit.
  """
  model = oracle_model(oracle)
  variables = from_reference(oracle.under('param/'), model)
  batch = oracle_batch(oracle, model.patch_size)
  mask = np.ones(len(batch['tokens']), bool)
  clip_norm = float(oracle['out/clip_norm'])
  if not 0 < clip_norm < float('inf'):
    raise UserError(f'oracle file: out/clip_norm={clip_norm} must be positive and finite')
  reference_sum = oracle.under('out/clipped_sum/')

  def loss_fn(params, example):
    return model.apply({**variables, 'params': params}, example['image'], example['tokens'])

  # Accelerators would otherwise multiply float32 matrices in fewer bits.
  with jax.default_matmul_precision('highest'):
    apply = jax.jit(model.apply, static_argnames='method')
    loss = apply(variables, batch['image'], batch['tokens'])
    encoder = apply(variables, batch['image'], method='encode')
    features = apply(variables, batch['image'], method='features')
    clipped = {
      name: jax.jit(
        functools.partial(
          clipped_sum,
          loss_fn,
          clip_norm=clip_norm,
          strategy=name,
        )
      )(variables['params'], batch, mask)
      for name in CLIPPING_STRATEGIES
    }
  return {
    'loss': relative_error(loss, oracle['out/loss']),
    'encoder': relative_error(encoder, oracle['out/encoder']),
    'features': relative_error(features, oracle['out/features']),
    'grad_norm': max(relative_error(c.norms, oracle['out/grad_norm']) for c in clipped.values()),
    'clipped_sum': {
      name: worst_error(to_reference(c.sum, model), reference_sum) for name, c in clipped.items()
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
    raise UserError(f'oracle file: out/clipped_sum/{different[0]} is missing or unknown')
  return float(np.max([relative_error(values[name], references[name]) for name in values]))


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m tools.check_oracle', description=__doc__.split('\n')[0]
  )
  parser.add_argument('file', help='an npz file in the layout that tools.make_oracle writes')
  file = parser.parse_args(argv).file
  try:
    print(json.dumps(oracle_errors(read_oracle(file))))
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
