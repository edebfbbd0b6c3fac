"""The normaliser-free residual network that TAN trains on ImageNet (Brock et al. 2021)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.key import COUNTS, POSITIVE, Key
from dpcap.models import classifier
from dpcap.models.convolution import Convolution
from dpcap.models.precision import at_least_float32

# Growth of the variance by a block, in units of its input's: alpha of the paper.
_ALPHA = 0.2

# As the released code has it; what gives relu of a standard normal variance 1 is
# sqrt(2 / (1 - 1 / pi)) = 1.7129.
_GAMMA = 1.7139588594436646


class NFResNet(classifier.Classifier):
  """NF-ResNet-50 by default: 25,557,048 parameters with 1,000 classes, for images of 224 px.

  The network of Brock et al. (arXiv 2101.08692) as the code of De et al. (arXiv 2204.13650) has it:
  pre-activation bottleneck blocks x -> shortcut + alpha g f(beta x), with standardised kernels,
  alpha 0.2, beta one over the deviation that x is expected to have, a gain g per block that starts
  at 0 (skip-init), relu times 1.7139, which keeps the variance; a 7x7 stem with stride 2 and a max
  pool; a head that starts at a deviation of 0.01. Stochastic depth, which De et al. have, is left
  out. TAN's code takes timm's model and differs: it averages 2x2 pixels before the 1x1 convolution
  of a shortcut, its relu is plain, g starts at 1.

  How its parameters are clipped: biases, gains and g directly, the head without per-example
  gradients. The kernels, which are standardised, fall back to vmap, with a warning: each example
  of a physical batch then holds kernels of its own and their gradients, 100 MB each.
  """

  KIND = 'normaliser-free residual network'
  KEYS = {
    **classifier.KEYS,
    'depths': Key(
      tuple, (3, 4, 6, 3), 'blocks of each stage; (3, 4, 23, 3) is NF-ResNet-101', check=COUNTS
    ),
    'width': Key(
      int, 64, 'channels of the stem; the first stage has four times as many', check=POSITIVE
    ),
  }

  head_init: nn.initializers.Initializer = nn.initializers.normal(0.01)

  @staticmethod
  def make_encoder(*, dtype: jnp.dtype, depths: Sequence[int], width: int) -> nn.Module:
    """See `Classifier`."""
    return NFResNetEncoder(tuple(depths), width, dtype)


class NFResNetEncoder(nn.Module):
  """Images (..., H, W, 3) -> float32 vectors (..., D), the mean over places.

  Attributes:
    depths, width: see `NFResNet`; D is width times 2 to the number of stages plus 1.
    dtype: compute type.
  """

  depths: tuple[int, ...]
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image_HxWx3: jax.Array) -> jax.Array:
    stem = Convolution(self.width, 7, 2, standardized=True, dtype=self.dtype, name='stem')
    x = nn.max_pool(stem(image_HxWx3), (3, 3), (2, 2), 'SAME')
    variance = 1.0
    strides = [
      (stage, 2 if stage and not place else 1, place == 0)
      for stage, depth in enumerate(self.depths)
      for place in range(depth)
    ]
    for i, (stage, stride, first) in enumerate(strides):
      block = BottleneckBlock(
        self.width * 2**stage, stride, first, variance**-0.5, self.dtype, name=f'block_{i}'
      )
      x = block(x)
      # A projected shortcut starts anew from variance 1.
      variance = (1.0 if first else variance) + _ALPHA**2
    return jnp.mean(at_least_float32(scaled_relu(x)), axis=(-3, -2))


class BottleneckBlock(nn.Module):
  """shortcut + alpha g f(beta x), for x (..., H, W, C); the result has 4 `channels`.

  Attributes:
    channels: inside.
    stride: of the 3x3 convolution.
    projected: whether the shortcut is a 1x1 convolution of beta x, activated, in place of x.
    beta: what x is multiplied by.
    dtype: compute type.
  """

  channels: int
  stride: int
  projected: bool
  beta: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def convolved(x, channels, size, stride, name):
      return Convolution(channels, size, stride, standardized=True, dtype=self.dtype, name=name)(x)

    y = scaled_relu(x) * self.beta
    shortcut = x
    if self.projected:
      shortcut = convolved(y, 4 * self.channels, 1, self.stride, 'shortcut')
    y = convolved(y, self.channels, 1, 1, 'first')
    y = convolved(scaled_relu(y), self.channels, 3, self.stride, 'second')
    y = convolved(scaled_relu(y), 4 * self.channels, 1, 1, 'third')
    gain = self.param('skip_gain', nn.initializers.zeros, ())
    return shortcut + y * gain.astype(self.dtype) * _ALPHA


def scaled_relu(x: jax.Array) -> jax.Array:
  """relu(x), times what gives it variance 1 where x is standard normal (nearly: see _GAMMA)."""
  return nn.relu(x) * _GAMMA
