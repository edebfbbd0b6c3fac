"""Convolutions as products of a matrix with patches of the image.

XLA on CPU has no fast gradient of a convolution, and no machine has one where the kernel is
computed (`Convolution.standardized`): to clip it, each example has a kernel of its own. With
patches both are matrix products, which are several times as fast there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Of the variance times the number of inputs (De et al. 2022).
_EPSILON = 1e-4


class Convolution(nn.Module):
  """Images (..., H, W, C) -> (..., H / stride, W / stride, features), rounded up, with a bias.

  Borders are padded with zeros, evenly (one more below and to the right where that is odd), as
  'SAME' says.

  With `standardized` the kernel of every output channel has mean 0 and norm 1, times a gain that
  is trained (scaled weight standardisation, Brock et al. 2021): it is a function of the parameter
  `kernel`, which is therefore clipped by vmap, with a warning. The gain is applied to the output,
  which is the same, so that it needs no more than a bias does.

  Attributes:
    features: output channels.
    size: side of the kernel, pixels.
    stride: pixels from one place of the kernel to the next.
    standardized: see above.
    dtype: compute type; kernels are standardised in float32.
  """

  features: int
  size: int
  stride: int = 1
  standardized: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_HxWxC: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x_HxWxC.shape[-1], self.features)
    kernel_KxO = self.param('kernel', nn.initializers.lecun_normal(), shape).reshape(
      -1, self.features
    )
    bias_O = self.param('bias', nn.initializers.zeros, (self.features,))
    if self.standardized:
      kernel_KxO = standardize(kernel_KxO)
    patches_HxWxK = cut_patches(x_HxWxC.astype(self.dtype), self.size, self.stride)
    y_HxWxO = patches_HxWxK @ kernel_KxO.astype(self.dtype)
    if self.standardized:
      gain_O = self.param('gain', nn.initializers.ones, (self.features,))
      y_HxWxO *= gain_O.astype(self.dtype)
    return y_HxWxO + bias_O.astype(self.dtype)


def standardize(kernel_KxO: jax.Array) -> jax.Array:
  """The kernel with columns of mean 0 and norm 1; those of almost no variance stay small."""
  centred_KxO = kernel_KxO - jnp.mean(kernel_KxO, axis=0)
  squares_O = jnp.sum(jnp.square(centred_KxO), axis=0)
  return centred_KxO * jax.lax.rsqrt(jnp.maximum(squares_O, _EPSILON))


def cut_patches(x_HxWxC: jax.Array, size: int, stride: int) -> jax.Array:
  """What a kernel sees at each of its places: (..., H / stride, W / stride, size * size * C).

  Within a patch the order is row, column, channel. See `Convolution` for the borders.
  """
  outs, pads = zip(*(_places(side, size, stride) for side in x_HxWxC.shape[-3:-1]))
  padded = jnp.pad(x_HxWxC, [(0, 0)] * (x_HxWxC.ndim - 3) + [*pads, (0, 0)])
  cut = lambda first, out: slice(first, first + stride * (out - 1) + 1, stride)
  shifted = [
    padded[..., cut(row, outs[0]), cut(column, outs[1]), :]
    for row in range(size)
    for column in range(size)
  ]
  return jnp.concatenate(shifted, axis=-1)


def _places(side: int, size: int, stride: int) -> tuple[int, tuple[int, int]]:
  """How many there are along a side, and by how much it is padded at either end."""
  out = -(-side // stride)
  missing = max(stride * (out - 1) + size - side, 0)
  return out, (missing // 2, missing - missing // 2)
