"""Weights of the reference implementations, into our models and back.

The official checkpoints are a dict whose entry "model" maps names to PyTorch tensors; as
numpy arrays those are what `from_reference` reads. The names of each model are in
`reference_names`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dpcap.errors import UserError
from dpcap.models.captioner import Captioner
from dpcap.models.mae import MAE
from dpcap.models.positions import image_positions, text_positions
from dpcap.models.reference_names.captioner import captioner_names
from dpcap.models.reference_names.mae import mae_names
from dpcap.models.reference_names.names import Names

# The reference computes its positions in float32; anything above rounding is another model.
POSITION_TOLERANCE = 1e-5


def from_reference(arrays: Mapping[str, np.ndarray], model: Captioner | MAE) -> dict[str, Any]:
  """Variables of `model` from a reference implementation's arrays.

  Args:
    arrays: name -> array in PyTorch's layout, as in the official checkpoints.
    model: of the kind and size that the arrays are for, its blocks unrolled.

  Returns:
    What `model.init` would return for the size of images that the arrays are for, with these
    weights, float32.

  Raises:
    UserError: naming the array that is missing, unknown, of another shape than the model's, or,
      for a position embedding, different from the sin-cos constants the model computes.
  """
  names = _names(model)
  table = {
    name: ((collection, *path), layout)
    for collection, kind in (('params', names.trained), ('frozen', names.frozen))
    for name, (path, layout) in kind.items()
  }
  for name in arrays:
    if name not in table and name not in names.unused and name not in names.positions:
      raise UserError(f'reference weights: unknown array {name!r} for a {_called(model)}')
  for name, (is_image, width) in names.positions.items():
    _check_positions(name, _get(arrays, name), is_image, width, model)

  expected = flatten_dict(_shapes(model, _side('pos_embed', _get(arrays, 'pos_embed'))))
  flat = {}
  for name, (path, layout) in table.items():
    array = _get(arrays, name)
    allowed = layout.save(np.zeros(expected[path].shape, bool)).shape
    if array.shape != allowed:
      raise UserError(
        f'reference weights: {name!r} has shape {array.shape}; a {_called(model)} needs {allowed}'
      )
    flat[path] = layout.load(array.astype(np.float32))
  return jax.tree.map(jnp.asarray, unflatten_dict(flat))


def to_reference(params: Mapping[str, Any], model: Captioner | MAE) -> dict[str, np.ndarray]:
  """The inverse of `from_reference` for a params-shaped tree (parameters or gradients).

  Returns name -> numpy array in PyTorch's layout, in the tree's dtype, for the trained names.
  """
  flat = flatten_dict(params)
  return {
    name: layout.save(np.asarray(flat[path]))
    for name, (path, layout) in _names(model).trained.items()
  }


def _names(model: Captioner | MAE) -> Names:
  return mae_names(model) if isinstance(model, MAE) else captioner_names(model)


def _called(model: Captioner | MAE) -> str:
  return f'{type(model).__name__} of this size'


def _shapes(model: Captioner | MAE, side: int) -> dict[str, Any]:
  """What `init` returns for images of side x side patches, as shapes."""
  pixels = side * model.patch_size
  example = {
    'image': jnp.zeros((pixels, pixels, 3)),
    'tokens': jnp.zeros(2, jnp.int32),  # weights do not depend on the text's length
    'key': jnp.zeros(2, jnp.uint32),
  }
  return jax.eval_shape(
    model.init, jax.random.key(0), *(example[field] for field in model.INPUTS)
  )


def _get(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
  if name not in arrays:
    raise UserError(f'reference weights: array {name!r} is missing')
  return np.asarray(arrays[name])


def _side(name: str, array: np.ndarray) -> int:
  """Patches along a side of the images that position embeddings (1, 1 + side^2, width) are for."""
  tokens = array.shape[1] if array.ndim == 3 else 0
  side = math.isqrt(max(tokens - 1, 0))
  if tokens != 1 + side**2:
    raise UserError(
      f'reference weights: {name!r} has {tokens} tokens; a square image has 1 + side^2'
    )
  return side


def _check_positions(
  name: str, array: np.ndarray, is_image: bool, width: int, model: Captioner | MAE
) -> None:
  """Refuses stored positions that the model would not compute itself."""
  if array.ndim != 3 or array.shape[0] != 1 or array.shape[2] != width:
    raise UserError(
      f'reference weights: {name!r} has shape {array.shape}; a {_called(model)} needs'
      f' (1, tokens, {width})'
    )
  tokens = array.shape[1]
  if tokens == 0:
    raise UserError(f'reference weights: {name!r} has no tokens')
  if is_image:
    side = _side(name, array)
    computed = image_positions(side, side, width)
  else:
    computed = text_positions(tokens, width)
  error = np.max(np.abs(array[0] - computed))
  if not error <= POSITION_TOLERANCE:
    way_out = '; train_positions=True takes them as they are' if isinstance(model, MAE) else ''
    raise UserError(
      f'reference weights: {name!r} differs from the sin-cos embedding by {error:.2g}; '
      f'at most {POSITION_TOLERANCE} is rounding{way_out}'
    )
