"""Layer normalisation against float64, and against Flax's where that is accurate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.models.layer_norm import LayerNorm


@pytest.mark.parametrize('mean, most', [(0, 2e-6), (30, 2e-5), (1000, 5e-4)])
def test_a_large_mean_takes_nothing_from_the_variance(mean, most):
  x = np.random.default_rng(0).normal(mean, 1, (50, 197, 64)).astype(np.float32)
  exact = x.astype(np.float64)
  exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
  layer = LayerNorm(epsilon=1e-6, dtype=jnp.float32)
  found = jax.jit(layer.apply)(layer.init(jax.random.key(0), x), x)
  assert np.abs(np.asarray(found) - exact).max() < most


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 3e-6), (jnp.bfloat16, 0.02)])
def test_it_is_flaxs_with_its_parameters_and_gradients(dtype, tolerance):
  rng = np.random.default_rng(0)
  x, weights = (jnp.asarray(rng.normal(size=(5, 32)), dtype) for _ in range(2))
  ours, theirs = (kind(epsilon=1e-5, dtype=dtype) for kind in (LayerNorm, nn.LayerNorm))
  params = jax.tree.map(lambda p: p + rng.normal(size=p.shape), theirs.init(jax.random.key(0), x))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x))
  assert ours.apply(params, x).dtype == dtype

  def loss(layer, params, x):
    return jnp.sum((layer.apply(params, x) * weights).astype(jnp.float32))

  found, expected = (
    jax.value_and_grad(lambda params, x: loss(layer, params, x), (0, 1))(params, x)
    for layer in (ours, theirs)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=10 * tolerance, rtol=tolerance
    )
