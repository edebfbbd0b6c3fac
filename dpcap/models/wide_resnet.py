"""The wide residual network that TAN trains on CIFAR-10 (Sander et al. 2023; De et al. 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.key import POSITIVE, Key
from dpcap.models import classifier
from dpcap.models.convolution import Convolution
from dpcap.models.group_norm import GroupNorm
from dpcap.models.precision import at_least_float32

_STEM_CHANNELS = 16


class WideResNet(classifier.Classifier):
  """WRN-16-4 by default: 2,751,562 parameters with 10 classes, for images of 32 px.

  A wide ResNet (Zagoruyko and Komodakis 2016) with group norms in place of batch norms, which would
  mix examples. As in the code of De et al. (arXiv 2204.13650) and TAN's: activations come BEFORE
  norms (relu, norm, convolution), also on the shortcut, which has a norm and a 1x1 convolution of
  its own in the first block of a stage; all convolutions have biases; kernels start as truncated
  normals of variance 1 / inputs; the epsilon of norms is 1e-5. De et al. standardise the kernels,
  TAN does not (`weight_standardization`). Borders are De et al.'s: where the stride is 2, TAN pads
  both ends.

  How its parameters are clipped: convolutions and the head without per-example gradients, biases
  and norms directly. Standardised kernels, and nothing else, fall back to vmap, with a warning.
  """

  KIND = 'wide residual network'
  KEYS = {
    **classifier.KEYS,
    'depth': Key(
      int, 16, '6 n + 4 layers: three stages of n blocks',
      check=(lambda x: x >= 10 and x % 6 == 4, '6 n + 4, such as 10, 16, 28 or 40'),
    ),
    'width': Key(int, 4, 'stages have 16, 32 and 64 channels times this', check=POSITIVE),
    'groups': Key(
      int, 16, 'of channels in each norm',
      check=(lambda x: x > 0 and _STEM_CHANNELS % x == 0, 'a divisor of 16'),
    ),
    'weight_standardization': Key(
      bool, False, 'standardise kernels, as De et al. do; clipped by vmap'
    ),
  }  # fmt: skip

  @staticmethod
  def make_encoder(
    *, dtype: jnp.dtype, depth: int, width: int, groups: int, weight_standardization: bool
  ) -> nn.Module:
    """See `Classifier`."""
    return WideResNetEncoder(
      blocks=(depth - 4) // 6,
      width=width,
      groups=groups,
      standardized=weight_standardization,
      dtype=dtype,
    )


class WideResNetEncoder(nn.Module):
  """Images (..., H, W, 3) -> float32 vectors (..., 64 width), the mean over places.

  Attributes:
    blocks: of each of three stages; the second and the third start by halving the sides.
    width, groups: see `WideResNet`.
    standardized: whether kernels are.
    dtype: compute type.
  """

  blocks: int
  width: int
  groups: int
  standardized: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image_HxWx3: jax.Array) -> jax.Array:
    settings = dict(standardized=self.standardized, dtype=self.dtype)
    x = Convolution(_STEM_CHANNELS, 3, **settings, name='stem')(image_HxWx3)
    for i in range(3 * self.blocks):
      stage, place = divmod(i, self.blocks)
      stride = 2 if stage and not place else 1
      channels = 16 * 2**stage * self.width
      x = WideBlock(channels, stride, place == 0, self.groups, **settings, name=f'block_{i}')(x)
    x = GroupNorm(self.groups, self.dtype, name='norm')(nn.relu(x))
    return jnp.mean(at_least_float32(x), axis=(-3, -2))


class WideBlock(nn.Module):
  """x + conv(norm(relu(conv(norm(relu(x)))))), for x (..., H, W, C).

  Attributes:
    channels: of the result.
    stride: of the first convolution.
    projected: whether the shortcut is conv(norm(relu(x))) in place of x.
    groups, standardized, dtype: see `WideResNetEncoder`.
  """

  channels: int
  stride: int
  projected: bool
  groups: int
  standardized: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def convolved(x, size, stride, name):
      x = GroupNorm(self.groups, self.dtype, name=f'{name}_norm')(nn.relu(x))
      settings = dict(standardized=self.standardized, dtype=self.dtype)
      return Convolution(self.channels, size, stride, **settings, name=name)(x)

    shortcut = convolved(x, 1, self.stride, 'shortcut') if self.projected else x
    x = convolved(x, 3, self.stride, 'first')
    return shortcut + convolved(x, 3, 1, 'second')
