"""From an image to a token for each patch by convolutions, instead of a linear map of its pixels."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.models.convolution import Convolution
from dpcap.models.group_norm import GroupNorm
from dpcap.models.wide_resnet import WideBlock

_MOST_GROUPS = 8  # of channels in a norm


class ConvolutionalStem(nn.Module):
  """Images (..., H, W, 3) -> tokens (..., P, width), a token for each patch, row by row.

  A convolution of stride 2, then residual blocks of stride 2 until a place is a patch; channels
  double up to `width`. A transformer has to learn what neighbouring pixels have to do with each
  other, for which private training has few examples and little signal.

  Attributes:
    patch_size: side of a patch, pixels; a power of 2, 2 at least.
    width: of a token, a multiple of patch_size / 2.
    dtype: compute type; norms use at least float32.

  Source: early convolutions, Xiao et al. 2021; the blocks are those of De et al. 2022.
  """

  patch_size: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image_HxWx3: jax.Array) -> jax.Array:
    stages = self.patch_size.bit_length() - 1
    channels = [self.width >> stages - 1 - stage for stage in range(stages)]
    groups = [math.gcd(c, _MOST_GROUPS) for c in channels]
    x = Convolution(channels[0], 3, stride=2, dtype=self.dtype, name='first')(image_HxWx3)
    for i in range(1, stages):
      x = WideBlock(channels[i], 2, True, groups[i - 1], False, self.dtype, name=f'block_{i}')(x)
    x = GroupNorm(groups[-1], self.dtype, name='norm')(nn.relu(x))
    return x.reshape(*x.shape[:-3], -1, self.width)


def fits(patch_size: int, width: int) -> bool:
  """Whether a stem has patches of that size, of that width."""
  stages = patch_size.bit_length() - 1
  return stages > 0 and patch_size == 2**stages and width % 2 ** (stages - 1) == 0
