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
    arrays: name -> array in PyTorch's layout, as in the official checkpoints, or what has a shape
      and becomes one (`weight_files.StoredArray`): nothing of an unfit shape is read.
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
    flat[path] = layout.load(np.asarray(array, np.float32))
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


def state_dict(
  variables: Mapping[str, Any], model: Captioner | MAE, image_size: int, text_length: int
) -> dict[str, np.ndarray]:
  """All that the reference model's `load_state_dict(strict=True)` asks for, in PyTorch's layout.

  Trained and frozen arrays are those of `variables`, bit for bit; fixed position embeddings are
  computed; what no output depends on is zero.

  Args:
    variables: {'params', 'frozen'}, blocks unrolled.
    model: what they are of.
    image_size: side of the images that the reference model is made for, pixels.
    text_length: of its texts, tokens.
  """
  names, frozen = _names(model), flatten_dict(variables['frozen'])
  arrays = to_reference(variables['params'], model)
  for name, (path, layout) in names.frozen.items():
    arrays[name] = layout.save(np.asarray(frozen[path]))
  side = image_size // model.patch_size
  for name, (is_image, width) in names.positions.items():
    grid, length = (side, side), text_length
    computed = image_positions(*grid, width) if is_image else text_positions(length, width)
    arrays[name] = computed[None].astype(np.float32)
  for name, (is_text, width) in names.unused.items():
    arrays[name] = np.zeros((1, text_length if is_text else 1, width), np.float32)
  return arrays


def _names(model: Captioner | MAE) -> Names:
  if getattr(model, 'stem', 'linear') != 'linear':
    raise UserError(f"stem={model.stem!r} has no reference weights; they are of stem='linear'")
  return mae_names(model) if isinstance(model, MAE) else captioner_names(model)


def _called(model: Captioner | MAE) -> str:
  return f'{type(model).__name__} of this size'


def _shapes(model: Captioner | MAE, side: int) -> dict[str, Any]:
  """What `init` returns for images of side x side patches, as shapes."""
  pixels = side * model.patch_size
  example = {
    'image': jax.ShapeDtypeStruct((pixels, pixels, 3), jnp.float32),
    'tokens': jax.ShapeDtypeStruct((2,), jnp.int32),  # weights do not depend on the text's length
    'key': jax.ShapeDtypeStruct((2,), jnp.uint32),
  }
  return jax.eval_shape(model.init, jax.random.key(0), *(example[name] for name in model.INPUTS))


def _get(arrays: Mapping[str, Any], name: str) -> Any:
  if name not in arrays:
    raise UserError(f'reference weights: array {name!r} is missing')
  return arrays[name]


def _side(name: str, array: Any) -> int:
  """Patches along a side of the images that position embeddings (1, 1 + side^2, width) are for."""
  tokens = array.shape[1] if len(array.shape) == 3 else 0
  side = math.isqrt(max(tokens - 1, 0))
  if tokens != 1 + side**2:
    raise UserError(
      f'reference weights: {name!r} has {tokens} tokens; a square image has 1 + side^2'
    )
  return side


def _check_positions(
  name: str, array: Any, is_image: bool, width: int, model: Captioner | MAE
) -> None:
  """Refuses stored positions that the model would not compute itself."""
  if len(array.shape) != 3 or array.shape[0] != 1 or array.shape[2] != width:
    raise UserError(
      f'reference weights: {name!r} has shape {array.shape}; a {_called(model)} needs'
      f' (1, tokens, {width})'
    )
  tokens = array.shape[1]
  if tokens == 0:
    raise UserError(f'reference weights: {name!r} has no tokens')
  if is_image:
    _side(name, array)
  error = _distance_from_sincos(array, is_image)
  if not error <= POSITION_TOLERANCE:
    way_out = '; train_positions=True takes them as they are' if isinstance(model, MAE) else ''
    raise UserError(
      f'reference weights: {name!r} differs from the sin-cos embedding by {error:.2g}; '
      f'at most {POSITION_TOLERANCE} is rounding{way_out}'
    )


def is_sincos(array: Any) -> bool:
  """Whether stored positions (1, 1 + side^2, D) of an image are what we compute, up to rounding."""
  return array.shape[2] % 4 == 0 and _distance_from_sincos(array, True) <= POSITION_TOLERANCE


def _distance_from_sincos(array: Any, is_image: bool) -> float:
  _, tokens, width = array.shape
  side = math.isqrt(tokens - 1)
  computed = image_positions(side, side, width) if is_image else text_positions(tokens, width)
  return np.max(np.abs(np.asarray(array)[0] - computed))
