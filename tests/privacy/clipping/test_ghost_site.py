"""The contract of a ghost site: what its backward pass gives on either order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.privacy.clipping.ghost_site import TAKE_NORMS, ghost_site
from dpcap.privacy.clipping.norms import SquaredNorm
from dpcap.privacy.clipping.tracing import trace_loss
from dpcap.privacy.clipping.uses import find_uses

BATCH, INPUTS, OUTPUTS = 3, 5, 7


@pytest.mark.parametrize('tokens', [1, 9])  # per-example gradients not formed, and formed
def test_a_backward_pass_takes_norms_or_the_sum_as_it_is_told(rng, tokens):
  x = np.float32(rng.normal(size=(BATCH, tokens, INPUTS)))
  w = np.float32(rng.normal(size=(INPUTS, OUTPUTS)))
  g = np.float32(rng.normal(size=(BATCH, tokens, OUTPUTS)))
  ((site,),) = find_uses(trace_loss(lambda w, x: jnp.sum(jnp.tanh(x @ w)), w, x), w).groups
  slot = SquaredNorm(*(jnp.zeros(BATCH) for _ in SquaredNorm._fields))
  (y, order), backward = jax.vjp(jax.vmap(ghost_site(site), (0, None, 0)), x, w, slot)
  np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
  assert order.shape == (BATCH,) and not order.any()
  grads = np.einsum('btk,bto->bko', x, g)

  dx, dw, norms = backward((g, jnp.full(BATCH, TAKE_NORMS)))
  np.testing.assert_allclose(norms.value, np.sum(grads**2, (1, 2)), rtol=1e-5)
  np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
  assert not dw.any()

  factors = np.float32([0.3, 0, 2])
  dx, dw, norms = backward((g, factors))
  np.testing.assert_allclose(dw, np.einsum('b,bko', factors, grads), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
  assert not any(leaf.any() for leaf in norms)
