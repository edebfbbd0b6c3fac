"""What is trained: models as flax modules, made from plain arguments.

A model is a `flax.linen.Module` whose call is the loss of one example (or of any leading
axes), with trained parameters in the collection 'params' and constants in 'frozen'.
"""

import flax.linen as nn
import jax.numpy as jnp

from dpcap.errors import UserError
from dpcap.models.blocks import stack_blocks, unstack_blocks
from dpcap.models.captioner import PADDING, Captioner
from dpcap.models.mae import MAE
from dpcap.models.sizes import SIZES, Size

__all__ = [
  'Captioner',
  'MAE',
  'MODELS',
  'PADDING',
  'SIZES',
  'Size',
  'make_model',
  'stack_blocks',
  'unstack_blocks',
]

MODELS = {'captioner': Captioner}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def make_model(
  name: str,
  *,
  size: str,
  image_size: int,
  vocab_size: int,
  dtype: str = 'float32',
  patch_size: int | None = None,
  scan_blocks: bool = False,
  remat: bool = False,
) -> nn.Module:
  """A model by name; nothing is initialised.

  Args:
    name: key of `MODELS`.
    size: key of `SIZES`.
    image_size: side of the square input images, pixels; a multiple of the patch.
    vocab_size: number of token ids of the tokenizer.
    dtype: compute type, 'float32' or 'bfloat16'; parameters are float32 either way.
    patch_size: pixels; None takes the size's own.
    scan_blocks, remat: see `Captioner`.

  Raises:
    UserError: naming the argument, its value and what is allowed.
  """
  named = (('model', name, MODELS), ('size', size, SIZES), ('dtype', dtype, DTYPES))
  for key, value, allowed in named:
    if value not in allowed:
      raise UserError(f'{key}={value!r} is unknown; choose one of {", ".join(allowed)}')
  if vocab_size < 1:
    raise UserError(f'vocab_size={vocab_size} must be at least 1')
  shape = SIZES[size]
  if patch_size is not None:
    if patch_size < 1:
      raise UserError(f'patch_size={patch_size} must be at least 1 pixel')
    shape = shape._replace(patch_size=patch_size)
  if image_size < 1 or image_size % shape.patch_size:
    raise UserError(
      f'image_size={image_size} must be a positive multiple of the patch size, {shape.patch_size}'
    )
  return MODELS[name](
    vocab_size=vocab_size,
    dtype=DTYPES[dtype],
    scan_blocks=scan_blocks,
    remat=remat,
    **shape._asdict(),
  )
