"""Official checkpoints: which of our models a file of reference weights is for, and back.

The names and shapes of the arrays tell everything: model, size, patch, image, text length and
vocabulary. What is not one of the sizes that the reference has is refused, for shapes do not tell
the heads of attention. Each kind of model is one row of `KINDS`.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from dpcap import models
from dpcap.errors import UserError
from dpcap.models import reference_weights, weight_files
from dpcap.models.sizes import SIZES

# Positions are computed: a file must not ask for any number of them.
_MOST_TOKENS = 2**16


class Description(NamedTuple):
  """What a file of reference weights is for.

  Attributes:
    model: keys of the config's section `model`, its name among them.
    image_size: side of the images, pixels.
    text_length: tokens; None: the model reads no text.
    vocab_size: token ids; None likewise.
  """

  model: dict[str, Any]
  image_size: int
  text_length: int | None
  vocab_size: int | None


class Kind(NamedTuple):
  """A model that official checkpoints are of.

  Attributes:
    mark: an array that no other kind has.
    describe: (arrays by name) -> Description; UserError names what is amiss.
    vocab_size: (params) -> token ids, or None.
  """

  mark: str
  describe: Callable[[Mapping[str, Any]], Description]
  vocab_size: Callable[[dict[str, Any]], int | None]


class OfficialFile(NamedTuple):
  """What a file of reference weights holds.

  Attributes:
    description: which model, and for what.
    variables: {'params', 'frozen'} of that model, blocks unrolled, float32.
    name: of the file, without its folder.
    sha256: of the file, hexadecimal.
    claims: what the publisher of a file of that name says of it; None: not known.
  """

  description: Description
  variables: dict[str, Any]
  name: str
  sha256: str
  claims: str | None


def is_official(path: str | os.PathLike) -> bool:
  """Whether a path is that of a file such as `read_official` takes, by its name."""
  return os.path.splitext(path)[1] in weight_files.EXTENSIONS and not os.path.isdir(path)


def read_official(path: str | os.PathLike) -> OfficialFile:
  """Reads a file of reference weights; of none of its arrays more than the model has.

  Raises:
    UserError: naming the file or the array that is not as it must be.
  """
  with weight_files.open_weights(path) as arrays:
    kind = find_kind(arrays)
    description = kind.describe(arrays)
    model = _make(description.model, description.image_size, description.vocab_size)
    variables = {'frozen': {}} | reference_weights.from_reference(arrays, model)
  name = os.path.basename(path)
  claims = CLAIMS.get(os.path.splitext(name)[0])
  return OfficialFile(description, variables, name, weight_files.sha256(path), claims)


def to_official(
  variables: Mapping[str, Any], model_keys: Mapping[str, Any], image_size: int, text_length: int
) -> dict[str, Any]:
  """All arrays of the reference's state dict, by name; the inverse of `read_official`.

  Args:
    variables: {'params', 'frozen'}, blocks unrolled.
    model_keys: the config's section `model` that they were made with.
    image_size: pixels.
    text_length: tokens.

  Raises:
    UserError: if the reference has no such model, or they are of another one than `model_keys`.
  """
  name = model_keys['name']
  if name not in KINDS:
    raise UserError(f'model.name is {name!r}; the reference has {", ".join(KINDS)}')
  try:
    vocab_size = KINDS[name].vocab_size(variables['params'])
    model = _make({**model_keys, 'scan_blocks': False}, image_size, vocab_size)
    arrays = reference_weights.state_dict(variables, model, image_size, text_length)
    # Nothing may have been left out, or come out otherwise.
    back = {'frozen': {}} | reference_weights.from_reference(arrays, model)
    exact = _same_bits(back, variables)
  except (UserError, KeyError, TypeError, ValueError) as e:
    raise UserError(f'the reference has no such weights ({e})') from e
  if not exact:
    raise UserError('the reference has no such weights: some do not come back as they are')
  return arrays


def _make(keys: Mapping[str, Any], image_size: int, vocab_size: int | None) -> nn.Module:
  # A model that reads no text has no use for it.
  return models.make_model(image_size=image_size, vocab_size=vocab_size or 1, **keys)


def _same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  equal = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
  return all(jax.tree.leaves(equal))


def find_kind(arrays: Mapping[str, Any]) -> Kind:
  """The kind of a file's arrays.

  Raises:
    UserError: if it is none.
  """
  found = [kind for kind in KINDS.values() if kind.mark in arrays]
  if len(found) != 1:
    marks = ', '.join(f'{kind.mark!r} ({name})' for name, kind in KINDS.items())
    raise UserError(f'reference weights: of no known model; one of these must be there: {marks}')
  return found[0]


def _describe_captioner(arrays: Mapping[str, Any]) -> Description:
  width, _, patch_size, _ = _shape(arrays, 'patch_embed.proj.weight', 4)
  decoder_width, _ = _shape(arrays, 'decoder_embed.weight', 2)
  shape = dict(
    width=width,
    depth=_count(arrays, 'blocks'),
    decoder_width=decoder_width,
    decoder_depth=_count(arrays, 'decoder.layers'),
  )
  size = _size(shape)
  return Description(
    model=dict(name='captioner', size=size, patch_size=_patch_size(size, patch_size)),
    image_size=_side(arrays, 'pos_embed') * patch_size,
    text_length=_tokens(arrays, 'text_decoder_pos_embed'),
    vocab_size=_shape(arrays, _CAPTIONER_MARK, 2)[0],
  )


def _describe_mae(arrays: Mapping[str, Any]) -> Description:
  width, _, patch_size, _ = _shape(arrays, 'patch_embed.proj.weight', 4)
  size = _size(dict(width=width, depth=_count(arrays, 'blocks')))
  return Description(
    model=dict(
      name='mae',
      size=size,
      patch_size=_patch_size(size, patch_size),
      decoder_width=_shape(arrays, 'decoder_embed.weight', 2)[0],
      decoder_depth=_count(arrays, 'decoder_blocks'),
      # As all of ViP's have it; shapes do not tell.
      decoder_heads=16,
      encoder_of='vip',
      train_positions=not all(
        reference_weights.is_sincos(arrays[name])
        for name in ('pos_embed', 'decoder_pos_embed')
        if _side(arrays, name)
      ),
    ),
    image_size=_side(arrays, 'pos_embed') * patch_size,
    text_length=None,
    vocab_size=None,
  )


def _size(shape: dict[str, int]) -> str:
  """The name of the size that has these widths and depths."""
  for name, size in SIZES.items():
    if shape.items() <= size._asdict().items():
      return name
  found = ', '.join(f'{key} {value}' for key, value in shape.items())
  raise UserError(f'reference weights: of no known size ({found}); allowed: {", ".join(SIZES)}')


def _patch_size(size: str, patch_size: int) -> int | None:
  """As configs have it: None where it is the size's own."""
  if patch_size < 1:
    raise UserError(f'reference weights: patches have {patch_size} pixels')
  return None if patch_size == SIZES[size].patch_size else patch_size


def _shape(arrays: Mapping[str, Any], name: str, dimensions: int) -> tuple[int, ...]:
  if name not in arrays:
    raise UserError(f'reference weights: array {name!r} is missing')
  shape = tuple(arrays[name].shape)
  if len(shape) != dimensions:
    raise UserError(
      f'reference weights: {name!r} has shape {shape}; it must have {dimensions} axes'
    )
  return shape


def _count(arrays: Mapping[str, Any], prefix: str) -> int:
  """How many blocks there are, `prefix`.0, `prefix`.1, ..."""
  pattern = re.compile(rf'{re.escape(prefix)}\.(\d+)\.', re.ASCII)
  return len({match[1] for match in map(pattern.match, arrays) if match})


def _side(arrays: Mapping[str, Any], name: str) -> int:
  """Patches along a side of the image that position embeddings (1, 1 + side^2, D) are for."""
  tokens = _tokens(arrays, name)
  side = math.isqrt(max(tokens - 1, 0))
  if side < 1 or tokens != 1 + side**2:
    raise UserError(
      f'reference weights: {name!r} has {tokens} tokens; a square image has 1 + side^2'
    )
  return side


def _tokens(arrays: Mapping[str, Any], name: str) -> int:
  """Of position embeddings (1, tokens, D)."""
  tokens = _shape(arrays, name, 3)[1]
  if tokens > _MOST_TOKENS:
    raise UserError(f'reference weights: {name!r} has {tokens:,} tokens; at most {_MOST_TOKENS:,}')
  return tokens


_CAPTIONER_MARK = 'text_embedding_layer_SimVLM.weight'

KINDS = {
  'captioner': Kind(
    mark=_CAPTIONER_MARK,
    describe=_describe_captioner,
    vocab_size=lambda params: params['decoder']['token_embedding']['embedding'].shape[0],
  ),
  'mae': Kind(
    mark='decoder_pred.weight',
    describe=_describe_mae,
    vocab_size=lambda params: None,
  ),
}

# What publishers say of their files, by name without extension.
CLAIMS = {
  'base-eps7': (
    'facebookresearch/dpcap: size base, epsilon about 7, sigma 0.527, 5,000 steps of 1.3 million,'
    " on MetaCLIP's data of 2 billion pairs; no delta is given"
  ),
  'ckpt-vip-syn-base': (
    'facebookresearch/ViP-MAE: size base, encoder and decoder, pre-trained on synthetic images'
    ' (Shaders21k) alone, without privacy'
  ),
}
