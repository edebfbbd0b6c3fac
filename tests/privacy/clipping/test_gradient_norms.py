"""Norms of whole gradients: what is known of the parts is in the bound of the whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.privacy.clipping.gradient_norms import gradient_norms
from dpcap.privacy.clipping.norms import SquaredNorm

SIZE = 4


def make_parts(rng):
  """Gradients that are formed, one of them large, and three parts that are not."""
  formed = [rng.normal(size=(SIZE, *shape)) for shape in [(3, 2), (), (5000,)]]
  unformed = [SquaredNorm(*rng.uniform(size=(4, SIZE))) for _ in range(3)]
  return [jnp.float32(g) for g in formed], [SquaredNorm(*map(jnp.float32, s)) for s in unformed]


def squares(formed):
  return sum(np.sum(np.float64(g).reshape(SIZE, -1) ** 2, axis=1) for g in formed)


def test_the_bound_has_the_norm_and_what_rounding_may_add_of_all_parts(rng):
  formed, unformed = make_parts(rng)
  norms = gradient_norms(SIZE, formed, unformed)
  total = SquaredNorm(*(np.sum(np.float64(terms), axis=0) for terms in zip(*unformed)))
  whole = squares(formed) + total.value
  np.testing.assert_allclose(norms.value, np.sqrt(whole), rtol=1e-6)
  expected = np.sqrt(whole + total.error) + np.sqrt(total.rounding)
  np.testing.assert_allclose(norms.bound, expected, rtol=2e-5)
  np.testing.assert_allclose(norms.flushed, total.flushed, rtol=1e-6)


def test_of_what_is_formed_the_bound_is_the_norm(rng):
  formed, _ = make_parts(rng)
  norms = gradient_norms(SIZE, formed, [])
  np.testing.assert_allclose(norms.value, np.sqrt(squares(formed)), rtol=1e-6)
  np.testing.assert_allclose(norms.bound, norms.value, rtol=1e-6)
  assert np.all(norms.flushed > 0) and np.all(norms.flushed < 1e-30)


@pytest.mark.parametrize('field', ['value', 'error', 'rounding'])
def test_no_norm_is_finite_whose_bound_is_not(rng, field):
  formed, unformed = make_parts(rng)
  of_second = jnp.arange(SIZE) == 1
  spoilt = jnp.where(of_second, jnp.inf, getattr(unformed[0], field))
  norms = gradient_norms(SIZE, formed, [unformed[0]._replace(**{field: spoilt}), *unformed[1:]])
  np.testing.assert_array_equal(np.isfinite(norms.value), ~of_second)
  np.testing.assert_array_equal(np.isfinite(norms.bound), ~of_second)
