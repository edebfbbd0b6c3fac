"""Noise: what turns a sum of clipped gradients into a release.

A mechanism is given the sum over one LOGICAL batch and adds noise to it exactly
once. Its noise is a function of the noise key and the step alone, drawn as whole
logical arrays: the same on any number of devices, and the same when a step is
replayed. Whatever state a mechanism carries from step to step (correlated noise)
must therefore be computable by `init(key, step, ...)`, so that the key alone, which
is kept secret, brings it back; it is never written to a checkpoint.

Call `add_noise` under `jax.jit`, outside of `shard_map`: inside, a shared key would
repeat the same noise on every shard.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

PyTree = Any


class Mechanism(Protocol):
  """The interface of a noise mechanism; see the module docstring."""

  def init(self, key: jax.Array, step: int, like: PyTree) -> PyTree:
    """The state before `step`, for sums shaped as `like`."""

  def add_noise(
    self, key: jax.Array, step: jax.Array, clipped: PyTree, state: PyTree
  ) -> tuple[PyTree, PyTree]:
    """The noisy sum of step `step`, and the state before the next step."""


@dataclasses.dataclass(frozen=True)
class GaussianMechanism:
  """Independent Gaussian noise of standard deviation noise_multiplier * clip_norm.

  Formal guarantee: for sums with L2 sensitivity clip_norm, each step is a Gaussian
  mechanism with the given noise_multiplier (`dp_accounting.GaussianDpEvent`), and
  distinct steps have independent noise. Noise is float32: values are rounded, and none is
  further out than about 5.4 standard deviations. The guarantee is that of the real-valued
  mechanism; what rounding and cut tails give away is not covered.

  Attributes:
    noise_multiplier: sigma, in units of clip_norm.
    clip_norm: C, the L2 sensitivity of the sum.
  """

  noise_multiplier: float
  clip_norm: float

  def init(self, key: jax.Array, step: int, like: PyTree) -> tuple[()]:
    """Independent noise carries no state."""
    del key, step, like
    return ()

  def add_noise(self, key, step, clipped, state):
    """Adds N(0, (sigma C)^2) to every coordinate; `key` a typed JAX key, `step` int."""
    leaves, treedef = jax.tree.flatten(clipped)
    step_key = jax.random.fold_in(key, step)
    stddev = self.noise_multiplier * self.clip_norm
    noisy = []
    for i, x in enumerate(leaves):
      dtype = jnp.promote_types(x.dtype, jnp.float32)
      noise = jax.random.normal(jax.random.fold_in(step_key, i), x.shape, dtype)
      noisy.append(x.astype(dtype) + stddev * noise)
    return treedef.unflatten(noisy), state


@dataclasses.dataclass(frozen=True)
class NoNoise:
  """Releases the sum as it is: no guarantee, for runs with epsilon = infinity."""

  noise_multiplier: float
  clip_norm: float

  def init(self, key: jax.Array, step: int, like: PyTree) -> tuple[()]:
    """Carries no state."""
    del key, step, like
    return ()

  def add_noise(self, key, step, clipped, state):
    """Returns the sum unchanged."""
    del key, step
    return clipped, state


MECHANISMS = {'gaussian': GaussianMechanism, 'none': NoNoise}
