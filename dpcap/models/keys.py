"""Config keys that models share, and what they mean."""

import jax.numpy as jnp

from dpcap.errors import UserError
from dpcap.key import POSITIVE, Key
from dpcap.models.sizes import SIZES, Size

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

DTYPE = Key(str, 'float32', 'compute type; parameters are float32', tuple(DTYPES))

# Those of vision transformers.
TRANSFORMER = {
  'size': Key(str, 'base', 'its size', tuple(SIZES)),
  'patch_size': Key(int, None, "pixels; None: the size's own", check=POSITIVE, optional=True),
  'dtype': DTYPE,
  'scan_blocks': Key(
    bool, False, 'compile one block of each kind, which runs as a scan; parameters are stacked'
  ),
}


def shape_of(size: str, patch_size: int | None, image_size: int) -> Size:
  """The shape of that size, with patches of `patch_size` pixels if given.

  Raises:
    UserError: if there is no such size, or patches do not tile the image.
  """
  shape = SIZES[one_of('size', size, SIZES)]
  if patch_size is not None:
    if patch_size < 1:
      raise UserError(f'patch_size={patch_size} must be at least 1 pixel')
    shape = shape._replace(patch_size=patch_size)
  if image_size < 1 or image_size % shape.patch_size:
    raise UserError(
      f'image_size={image_size} must be a positive multiple of the patch size, {shape.patch_size}'
    )
  return shape


def one_of(key: str, value: str, allowed) -> str:
  """The value, which must be an allowed one.

  Raises:
    UserError: if it is not.
  """
  if value not in allowed:
    raise UserError(f'{key}={value!r} is unknown; choose one of {", ".join(allowed)}')
  return value
