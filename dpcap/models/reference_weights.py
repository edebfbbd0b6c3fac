"""Weights of the reference implementation (facebookresearch/dpcap), into the captioner and back.

The official checkpoints are a dict whose entry "model" maps names to PyTorch tensors; as
numpy arrays those are what `from_reference` reads.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dpcap.errors import UserError
from dpcap.models.captioner import Captioner
from dpcap.models.positions import image_positions, text_positions

# In every official checkpoint, but no output of DP-Cap depends on them. As `_POSITIONS` below, and
# reference name -> the model's field that holds its width.
_UNUSED_POSITIONS = {'text_pos_embed': (False, 'width')}
_UNUSED_TOKENS = {
  'encoder_text_type_embedding': 'width',
  'mask_token': 'decoder_width',
  'mask_token_text': 'decoder_width',
}
UNUSED = (*_UNUSED_POSITIONS, *_UNUSED_TOKENS)

# The reference computes its positions in float32; anything above rounding is another model.
POSITION_TOLERANCE = 1e-5


class _Layout(NamedTuple):
  """How a PyTorch array becomes a flax one, and back; both take and return numpy arrays."""

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


_SAME = _Layout(lambda x: x, lambda x: x)
_DENSE = _Layout(np.transpose, np.transpose)  # out x in <-> in x out
_TOKEN = _Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x[None, None])  # 1 x 1 x D <-> D


def _patch_layout(patch_size: int) -> _Layout:
  """Convolution kernel out x 3 x p x p <-> Dense kernel over patches (p * p * 3) x out."""
  return _Layout(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1),
  )


def from_reference(arrays: Mapping[str, np.ndarray], model: Captioner) -> dict[str, Any]:
  """Variables {'params', 'frozen'} of `model` from the reference implementation's arrays.

  Args:
    arrays: name -> array in PyTorch's layout, as in the official checkpoints, or what has a shape
      and becomes one (`weight_files.StoredArray`).
    model: a captioner of the size that the arrays are for.

  Returns:
    What `model.init` would return, with these weights, float32.

  Raises:
    UserError: naming the array that is missing, unknown, of another shape than the model's, or,
      for a position embedding, different from the sin-cos constants the model computes.
  """
  # Weights depend neither on the image's size nor on the text's length: init on the least.
  variables = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((model.patch_size, model.patch_size, 3)),
    jnp.zeros(2, jnp.int32),
  )
  expected = flatten_dict(variables)
  table = {
    name: ((collection, *path), layout)
    for collection, names in (('params', _trained(model)), ('frozen', _FROZEN))
    for name, (path, layout) in names.items()
  }
  for name in arrays:
    if name not in table and name not in UNUSED and name not in _POSITIONS:
      raise UserError(f'reference weights: unknown array {name!r} for this size of captioner')

  flat = {}
  for name, (path, layout) in table.items():
    array = _get(arrays, name)
    # Before anything of it is read: it may be in a file.
    allowed = layout.save(np.zeros(expected[path].shape, bool)).shape
    if array.shape != allowed:
      raise UserError(
        f'reference weights: {name!r} has shape {array.shape}; this captioner needs {allowed}'
      )
    flat[path] = layout.load(np.asarray(array, np.float32))
  for name, (is_image, width) in _POSITIONS.items():
    _check_positions(name, _get(arrays, name), is_image, getattr(model, width))
  return jax.tree.map(jnp.asarray, unflatten_dict(flat))


def to_reference(params: Mapping[str, Any], model: Captioner) -> dict[str, np.ndarray]:
  """The inverse of `from_reference` for a params-shaped tree (parameters or gradients).

  Returns name -> numpy array in PyTorch's layout, in the tree's dtype, for the trained names.
  """
  flat = flatten_dict(params)
  return {
    name: layout.save(np.asarray(flat[path])) for name, (path, layout) in _trained(model).items()
  }


def state_dict(
  variables: Mapping[str, Any], model: Captioner, image_size: int, text_length: int
) -> dict[str, np.ndarray]:
  """All that the reference model's `load_state_dict(strict=True)` asks for, in PyTorch's layout.

  Trained and frozen arrays are those of `variables`, bit for bit; position embeddings are computed;
  what DP-Cap never uses (`UNUSED`) is zero, but for `text_pos_embed`, a position embedding too.

  Args:
    variables: {'params', 'frozen'}, blocks unrolled.
    model: what they are of.
    image_size: side of the images that the reference model is made for, pixels.
    text_length: of its texts, tokens.
  """
  frozen = flatten_dict(variables['frozen'])
  arrays = to_reference(variables['params'], model)
  arrays |= {name: layout.save(np.asarray(frozen[path])) for name, (path, layout) in _FROZEN.items()}
  side = image_size // model.patch_size
  for name, (is_image, field) in (_POSITIONS | _UNUSED_POSITIONS).items():
    width = getattr(model, field)
    computed = image_positions(side, side, width) if is_image else text_positions(text_length, width)
    arrays[name] = computed[None].astype(np.float32)
  for name, field in _UNUSED_TOKENS.items():
    arrays[name] = np.zeros((1, 1, getattr(model, field)), np.float32)
  return arrays


def _trained(model: Captioner) -> dict[str, tuple[tuple[str, ...], _Layout]]:
  """Reference name -> (path in 'params', layout) of every trained array."""
  table = {}

  def add(name: str, *path: str, kernel: _Layout = _DENSE, bias: bool = True):
    table[f'{name}.weight'] = ((*path, 'kernel'), kernel)
    if bias:
      table[f'{name}.bias'] = ((*path, 'bias'), _SAME)

  def add_norm(name: str, *path: str):
    table[f'{name}.weight'] = ((*path, 'scale'), _SAME)
    table[f'{name}.bias'] = ((*path, 'bias'), _SAME)

  add('patch_embed.proj', 'encoder', 'patch_projection', kernel=_patch_layout(model.patch_size))
  for i in range(model.depth):
    name, path = f'blocks.{i}', ('encoder', f'block_{i}')
    add_norm(f'{name}.norm1', *path, 'attention_norm')
    add(f'{name}.attn.qkv', *path, 'attention_qkv', bias=False)
    add(f'{name}.attn.proj', *path, 'attention_out')
    add_norm(f'{name}.norm2', *path, 'mlp_norm')
    add(f'{name}.mlp.fc1', *path, 'mlp_in')
    add(f'{name}.mlp.fc2', *path, 'mlp_out')
  add_norm('norm', 'encoder', 'norm')

  add('decoder_embed', 'memory_projection')
  table['text_embedding_layer_SimVLM.weight'] = (('decoder', 'token_embedding', 'embedding'), _SAME)
  for i in range(model.decoder_depth):
    name, path = f'decoder.layers.{i}', ('decoder', f'block_{i}')
    add(f'{name}.self_attn.c_attn', *path, 'self_qkv', bias=False)
    add(f'{name}.self_attn.c_proj', *path, 'self_out', bias=False)
    add_norm(f'{name}.norm1', *path, 'self_norm')
    add(f'{name}.multihead_attn.q_proj', *path, 'cross_q', bias=False)
    add(f'{name}.multihead_attn.kv_proj', *path, 'cross_kv', bias=False)
    add(f'{name}.multihead_attn.c_proj', *path, 'cross_out', bias=False)
    add_norm(f'{name}.norm2', *path, 'cross_norm')
    add(f'{name}.linear1', *path, 'mlp_in', bias=False)
    add(f'{name}.linear2', *path, 'mlp_out', bias=False)
    add_norm(f'{name}.norm3', *path, 'mlp_norm')
  add_norm('decoder_pred_text.0', 'decoder', 'norm')
  add('decoder_pred_text.1', 'decoder', 'logits')
  return table


# Reference name -> (path in 'frozen', layout).
_FROZEN = {
  'cls_token': (('encoder', 'class_token'), _TOKEN),
  'encoder_image_type_embedding': (('encoder', 'type_embedding'), _TOKEN),
  'decoder_image_type_embedding': (('memory_type_embedding',), _TOKEN),
  'decoder_text_type_embedding': (('decoder', 'type_embedding'), _TOKEN),
}

# Reference name -> (of an image rather than a text, the model's field that holds its width).
_POSITIONS = {
  'pos_embed': (True, 'width'),
  'decoder_pos_embed': (True, 'decoder_width'),
  'text_decoder_pos_embed': (False, 'decoder_width'),
}


def _get(arrays: Mapping[str, Any], name: str) -> Any:
  if name not in arrays:
    raise UserError(f'reference weights: array {name!r} is missing')
  return arrays[name]


def _check_positions(name: str, array: np.ndarray, is_image: bool, width: int):
  """Refuses stored positions that the model would not compute itself."""
  if len(array.shape) != 3 or array.shape[0] != 1 or array.shape[2] != width:
    raise UserError(
      f'reference weights: {name!r} has shape {array.shape}; '
      f'this captioner needs (1, tokens, {width})'
    )
  tokens = array.shape[1]
  if tokens == 0:
    raise UserError(f'reference weights: {name!r} has no tokens')
  if is_image:
    side = math.isqrt(tokens - 1)
    if tokens != 1 + side**2:
      raise UserError(
        f'reference weights: {name!r} has {tokens} tokens; a square image has 1 + side^2'
      )
    computed = image_positions(side, side, width)
  else:
    computed = text_positions(tokens, width)
  error = np.max(np.abs(np.asarray(array)[0] - computed))
  if not error <= POSITION_TOLERANCE:
    raise UserError(
      f'reference weights: {name!r} differs from the sin-cos embedding by {error:.2g}; '
      f'at most {POSITION_TOLERANCE} is rounding'
    )
