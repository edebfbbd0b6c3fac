"""A multi-layer perceptron, for images as small and plain as MNIST's."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.key import COUNTS, Key
from dpcap.models import classifier, keys
from dpcap.models.precision import at_least_float32

_ACTIVATIONS = {'relu': nn.relu, 'tanh': nn.tanh}


class MLP(classifier.Classifier):
  """Dense layers on all pixels. Its features are the last hidden layer.

  How its parameters are clipped: matrices without per-example gradients, biases directly.
  """

  KIND = 'multi-layer perceptron'
  KEYS = {
    **classifier.KEYS,
    'widths': Key(tuple, (256, 128), 'of the hidden layers', check=COUNTS),
    'activation': Key(
      str, 'tanh', 'after every hidden layer; bounded ones suit clipping', tuple(_ACTIVATIONS)
    ),
  }

  @staticmethod
  def make_encoder(*, dtype: jnp.dtype, widths: Sequence[int], activation: str) -> nn.Module:
    """See `Classifier`."""
    keys.one_of('activation', activation, _ACTIVATIONS)
    return HiddenLayers(tuple(widths), activation, dtype)


class HiddenLayers(nn.Module):
  """Images (..., H, W, 3) -> float32 vectors (..., widths[-1]).

  Attributes:
    widths, activation: see `MLP`.
    dtype: compute type.
  """

  widths: tuple[int, ...]
  activation: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image_HxWx3: jax.Array) -> jax.Array:
    x_D = image_HxWx3.reshape(*image_HxWx3.shape[:-3], -1)
    for i, width in enumerate(self.widths):
      dense = nn.Dense(width, dtype=self.dtype, name=f'layer_{i}')
      x_D = _ACTIVATIONS[self.activation](dense(x_D))
    return at_least_float32(x_D)
