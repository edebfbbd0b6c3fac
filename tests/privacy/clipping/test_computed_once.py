"""Norms and sums are of the same numbers, whatever a compiler computes again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.privacy import CLIPPING_STRATEGIES, clipped_sum, settled
from tests.privacy.clipping.compiler_options import AT_LEISURE
from tests.privacy.clipping.programs import MARGIN, norm

_TOKENS, _IN, _OUT = 40, 128, 128


def _nearly_nothing():
  """A batch of two in which u * s - z is 0 where u * s is rounded, and else what rounding took."""
  rng = np.random.default_rng()
  u, s = (rng.uniform(0, 1e5, (2, 2, _OUT))).astype(np.float32)
  z = np.broadcast_to((u * s)[:, None], (2, _TOKENS, _OUT))
  x = rng.uniform(size=(2, _TOKENS, _IN)).astype(np.float32)
  return {'x': x, 'u': u, 's': s, 'z': z}


def _rest(example):
  return example['u'] * example['s'] - example['z']


@jax.custom_vjp
def _without_value(y, g):
  """Sum of y * g, but for its value."""
  del y, g
  return jnp.zeros(())


_without_value.defvjp(
  lambda y, g: (jnp.zeros(()), g), lambda g, cotangent: (cotangent * g, jnp.zeros_like(g))
)


# Parameters, and the loss of an example: the rest as an output's gradient, as an input, as a
# parameter's gradient, of a loss whose value says nothing, in what is computed again, and where
# layers share a program.
LOSSES = {
  'gradient': (
    {'w': (_IN, _OUT)},
    lambda p, e: jnp.sum((e['x'] @ p['w']) * _rest(e)),
  ),
  'input': (
    {'w': (_OUT, _IN)},
    lambda p, e: jnp.sum((_rest(e) @ p['w']) * e['x']),
  ),
  'direct': (
    {'b': (_TOKENS, _OUT)},
    lambda p, e: jnp.sum(p['b'] * _rest(e)),
  ),
  'constant loss': (
    {'w': (_IN, _OUT)},
    lambda p, e: _without_value(e['x'] @ p['w'], _rest(e)),
  ),
  'constant loss, direct': (
    {'b': (_TOKENS, _OUT)},
    lambda p, e: _without_value(p['b'] + e['z'], _rest(e)),
  ),
  'scan with remat': (
    {'w': (2, _IN, _OUT)},
    lambda p, e: jax.lax.scan(
      jax.checkpoint(lambda loss, w: (loss + jnp.sum((e['x'] @ w) * _rest(e)), None)), 0.0, p['w']
    )[0],
  ),
  'layers': (
    {f'w{i}': (_IN, _OUT) for i in range(3)},
    lambda p, e: sum(jnp.sum((e['x'] * (i + 1) @ p[f'w{i}']) * _rest(e)) for i in range(3)),
  ),
}


@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('strategy', CLIPPING_STRATEGIES)
@pytest.mark.parametrize('name', LOSSES)
def test_a_rest_of_large_terms_is_bounded_as_it_is_summed(name, strategy, mapped):
  shapes, loss = LOSSES[name]
  params = {k: jnp.ones(shape) for k, shape in shapes.items()}
  of_batch = lambda batch, mask: clipped_sum(
    loss, params, batch, mask, clip_norm=1.0, strategy=strategy
  )
  batch, mask = _nearly_nothing(), np.array([True, False])
  if mapped:
    of_batch = jax.vmap(of_batch)
    batch, mask = jax.tree.map(lambda x: np.stack([x, x]), (batch, mask))
  compiled = jax.jit(of_batch).lower(batch, mask).compile(AT_LEISURE)
  sums = jax.tree.map(lambda x: x[0] if mapped else x, compiled(batch, mask).sum)
  assert norm(sums) <= MARGIN


@pytest.mark.parametrize('strategy', CLIPPING_STRATEGIES)
def test_that_all_is_known_when_it_is_compiled_changes_nothing(strategy):
  shapes, loss = LOSSES['constant loss']
  params = {k: jnp.ones(shape) for k, shape in shapes.items()}
  batch, mask = _nearly_nothing(), np.array([True, False])
  of_constants = lambda: clipped_sum(loss, params, batch, mask, clip_norm=1.0, strategy=strategy)
  sums = jax.jit(of_constants).lower().compile(AT_LEISURE)().sum
  assert norm(sums) <= MARGIN


def test_it_changes_nothing():
  tree = {'f': jnp.array([1.5, np.nan, -0.0]), 'i': jnp.arange(3), 'b': jnp.array([True, False])}
  tree |= {'h': jnp.array([1.5, -2], jnp.bfloat16), 'none': jnp.zeros((0, 3))}
  for witness in (jnp.ones(3), jnp.full(3, jnp.nan), tree, {}):
    out = jax.jit(settled)(tree, witness)
    for key, x in tree.items():
      assert out[key].dtype == x.dtype
      assert np.asarray(out[key]).tobytes() == np.asarray(x).tobytes()
