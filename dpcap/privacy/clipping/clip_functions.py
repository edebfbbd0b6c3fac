"""From the norm of an example's gradient to the factor it is scaled by.

A clip function maps a norm >= 0, of one gradient, and clip_norm C to a factor with

    0 <= factor * norm <= C,

so that one example moves the sum by at most C, its L2 sensitivity. `clipped_sum` holds any
function to it, and shows it one norm at a time: a factor that depends on the norms of others,
however small it is, lets one example change what another contributes.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

# Beside a smaller one, gradients count whose squares vanish in float32.
SMALLEST_GAMMA = 1e-12


class ClipFunction(Protocol):
  """The interface; see the module docstring."""

  def __call__(self, norm: jax.Array, clip_norm: float) -> jax.Array:
    """The factor () for a norm ()."""


@dataclasses.dataclass(frozen=True)
class Clip:
  """min(1, C / norm): gradients up to norm C stay as they are (Abadi et al. 2016).

  Sensitivity C.
  """

  def __call__(self, norm: jax.Array, clip_norm: float) -> jax.Array:
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))


@dataclasses.dataclass(frozen=True)
class Automatic:
  """C / (norm + gamma): every gradient gets a norm of nearly C (Bu et al. 2022, AUTO-S).

  C then only scales the learning rate. Small gradients are scaled up, the less the larger
  gamma is. Sensitivity C, never reached. Source: arXiv 2206.07136, equation 4.1.

  Attributes:
    gamma: at least SMALLEST_GAMMA, in units of the gradient's norm.

  Raises:
    ValueError: if gamma is smaller, or not finite.
  """

  gamma: float = 0.01

  def __post_init__(self):
    if not SMALLEST_GAMMA <= self.gamma < float('inf'):
      raise ValueError(
        f'gamma is {self.gamma}; it must be positive and finite, at least {SMALLEST_GAMMA}'
      )

  def __call__(self, norm: jax.Array, clip_norm: float) -> jax.Array:
    # Past the largest float, times a gradient of zeros, it would be NaN.
    return jnp.minimum(clip_norm / (norm + self.gamma), jnp.finfo(norm.dtype).max)


CLIP_FUNCTIONS = {'clip': Clip, 'automatic': Automatic}
