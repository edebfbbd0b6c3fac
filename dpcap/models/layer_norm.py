"""Layer normalisation that keeps its accuracy where the mean is far larger than the deviation."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.models.precision import at_least_float32


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis of x (..., D).

  The variance is that of x - mean. Flax takes E[x^2] - E[x]^2, which loses it to rounding where the
  mean is large: at mean / deviation 30 its result is off by 7e-4 in float32 and at 1,000 by 0.8,
  this one by 5e-6 and 2e-4. Trained weights may have such activations. Flax's own other way
  (`use_fast_variance=False`) is as accurate and takes longer, for it computes x - mean twice.

  Attributes:
    epsilon: of the variance.
    dtype: of the result; everything before is computed in at least float32.

  Source: Ba et al. 2016.
  """

  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias_D = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    x = at_least_float32(x)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(variance + self.epsilon) * scale_D + bias_D).astype(self.dtype)
