"""Group normalisation: of one example by itself, unlike batch normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.models.precision import at_least_float32


class GroupNorm(nn.Module):
  """x (..., H, W, C) of mean 0 and variance 1 over space and each group of channels; scale, bias.

  Groups are of neighbouring channels. The variance is that of x - mean (see `LayerNorm`).

  Attributes:
    groups: how many; they divide C.
    dtype: of the result; everything before is computed in at least float32.

  Source: Wu and He 2018.
  """

  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_HxWxC: jax.Array) -> jax.Array:
    channels = x_HxWxC.shape[-1]
    scale_C = self.param('scale', nn.initializers.ones, (channels,))
    bias_C = self.param('bias', nn.initializers.zeros, (channels,))
    grouped = (*x_HxWxC.shape[:-1], self.groups, channels // self.groups)
    x = at_least_float32(x_HxWxC).reshape(grouped)
    x -= jnp.mean(x, axis=(-4, -3, -1), keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(-4, -3, -1), keepdims=True) + 1e-5)
    return (x.reshape(x_HxWxC.shape) * scale_C + bias_C).astype(self.dtype)
