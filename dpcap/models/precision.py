"""The least precision that norms, losses and features are computed in."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` in float32, or in its own type if that is finer."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
