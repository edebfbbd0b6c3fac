"""Every strategy gives what `vmap` gives, on a zoo of models, and keeps its promises there."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import pytest
from jax import lax

from dpcap import privacy
from tests.privacy.clipping import zoo
from tests.privacy.clipping.compiler_options import haste
from tests.privacy.clipping.programs import (
  BATCH,
  CLIP_NORM,
  FLOAT32,
  INF,
  NAN,
  assert_close,
  both_strategies,
  cast,
  check_unusable_is_masked,
  difference,
  half_clipped,
  has_floats,
  norm,
  program,
  random_mask,
  spoil,
)

# --- Agreement.


def check_agrees(rng, build, strategy, dtype, with_dtype, tolerance):
  """In floats of `dtype` with vmap in `with_dtype`, on examples that both types hold."""
  batch, mask = build().make_batch(rng, BATCH), random_mask(rng)
  batch = cast(cast(batch, dtype), with_dtype)
  scale = dtype(half_clipped(build, with_dtype, batch, mask))
  expected = program(build, 'vmap', with_dtype).call(batch, mask, scale)
  actual = program(build, strategy, dtype).call(batch, mask, scale)
  assert_close(actual, expected, tolerance)
  assert {leaf.dtype for leaf in jax.tree.leaves(actual.sum)} == {np.dtype(dtype)}


@both_strategies
@pytest.mark.parametrize('name', zoo.ZOO)
def test_agrees_with_vmap_in_float64(rng, name, strategy):
  check_agrees(rng, zoo.ZOO[name], strategy, np.float64, np.float64, 1e-10)


@both_strategies
@pytest.mark.parametrize('name', FLOAT32)
def test_agrees_in_float32_with_vmap_in_float64(rng, name, strategy):
  check_agrees(rng, zoo.ZOO[name], strategy, np.float32, np.float64, 1e-5)


@both_strategies
@pytest.mark.parametrize('name', zoo.BFLOAT16)
def test_agrees_with_vmap_where_the_model_computes_in_bfloat16(rng, name, strategy):
  check_agrees(rng, zoo.BFLOAT16[name], strategy, np.float32, np.float32, 2e-2)


@both_strategies
@pytest.mark.parametrize('name', ['mlp', 'conv_grouped', 'lookups', 'scan_over_time', 'remat'])
def test_agrees_with_jax_privacy(rng, name, strategy):
  build = zoo.ZOO[name]
  model = build()
  batch, mask = model.make_batch(rng, BATCH), np.ones(BATCH, bool)
  scale = half_clipped(build, np.float64, batch, mask)
  actual = program(build, strategy, np.float64).call(batch, mask, scale)
  with jax.enable_x64(True):
    reference = jax_privacy.clipped_grad(
      lambda params, example: scale * model.loss_fn(params, example),
      l2_clip_norm=CLIP_NORM,
      keep_batch_dim=False,
    )
    expected = jax.jit(reference, compiler_options=haste())(model.params, batch)
  # It multiplies by a reciprocal, and takes C to be a float32.
  assert norm(difference(actual.sum, expected)) <= 1e-6 * norm(expected)


@both_strategies
@pytest.mark.parametrize('name', zoo.ZOO)
def test_physical_batches_add_up_to_one_batch(rng, name, strategy):
  build = zoo.ZOO[name]
  call, batch = program(build, strategy, np.float64).call, build().make_batch(rng, BATCH)
  scale = half_clipped(build, np.float64, batch, np.ones(BATCH, bool))
  whole = call(batch, np.ones(BATCH, bool), scale)
  part = rng.integers(3, size=BATCH)
  # In places of their own, filled up with other examples.
  parts = []
  for i in range(3):
    order = np.argsort(part != i, kind='stable')
    filled = jax.tree.map(lambda x, order=order: x[order], batch)
    parts.append(call(filled, part[order] == i, scale))
    np.testing.assert_allclose(parts[-1].norms[part[order] == i], whole.norms[part == i], 1e-12)
  total = jax.tree.map(lambda *xs: sum(xs), *(p.sum for p in parts))
  assert norm(difference(total, whole.sum)) <= 1e-12 * norm(whole.sum)


@pytest.mark.parametrize('name', ['dense_on_tokens', 'remat', 'scan_over_rematerialised_layers'])
def test_auto_is_bookkeeping_but_ghost_for_a_loss_with_remat(rng, name):
  model = zoo.ZOO[name]()
  batch = cast(model.make_batch(rng, BATCH), np.float32)
  chosen = privacy.choose_strategy(model.loss_fn, cast(model.params, np.float32), batch)
  assert chosen == ('ghost' if 'remat' in name else 'bookkeeping')


# --- Unusable examples.


@both_strategies
@pytest.mark.parametrize('name', [name for name in zoo.ZOO if has_floats(name)])
def test_an_unusable_example_is_as_if_masked(rng, name, strategy):
  build = zoo.ZOO[name]
  call, expect = (program(build, s, np.float64).call for s in (strategy, 'vmap'))
  batch, bad = build().make_batch(rng, BATCH), np.arange(BATCH) == rng.integers(BATCH)
  check_unusable_is_masked(call, batch, bad, NAN)
  for value in (NAN, INF):
    # Some models make something finite of it.
    if not np.isfinite(expect(spoil(batch, bad, value)).norms[bad]):
      assert not np.isfinite(check_unusable_is_masked(call, batch, bad, value))


@both_strategies
def test_a_batch_of_unusable_examples_gives_zero(rng, strategy):
  call = program(zoo.ZOO['dense_on_tokens'], strategy, np.float32).call
  batch = zoo.ZOO['dense_on_tokens']().make_batch(rng, BATCH)
  result = call(spoil(batch, np.ones(BATCH, bool), NAN))
  assert norm(result.sum) == 0 and not np.isfinite(result.norms).any()
  nothing = call(spoil(batch, np.ones(BATCH, bool), NAN), np.zeros(BATCH, bool))
  assert norm(nothing.sum) == 0 and not nothing.norms.any() and not nothing.losses.any()


# --- Fallbacks.


def paths(params):
  """Path of each parameter -> its shape."""
  named = jax.tree_util.tree_leaves_with_path(params)
  key = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {key(path): leaf.shape for path, leaf in named}


@both_strategies
@pytest.mark.parametrize('name', zoo.ZOO)
def test_warns_once_and_only_of_parameters_that_fall_back(name, strategy):
  model = zoo.ZOO[name]()
  caught = program(zoo.ZOO[name], strategy, np.float64).warnings
  messages = [str(w.message) for w in caught if w.category is privacy.ClippingFallbackWarning]
  assert len(messages) == len(caught), 'warnings of another kind'
  assert len(messages) <= 1
  named = {
    path
    for path, shape in paths(model.params).items()
    for message in messages
    if re.search(rf'(?<![\w/]){re.escape(f"{path} {shape}")}: used by \w+', message)
  }
  assert set(model.fallback) <= named <= {*model.fallback, *model.may_fall_back}
  if messages:
    assert named


def test_vmap_never_warns():
  for build in zoo.ZOO.values():
    assert not program(build, 'vmap', np.float64).warnings


# --- What is held.


def sizes_held(jaxpr) -> set[int]:
  """Number of entries of every intermediate, whatever it is nested in."""
  sizes = set()
  for eqn in jaxpr.eqns:
    sizes |= {v.aval.size for v in eqn.outvars if hasattr(v.aval, 'size')}
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      if hasattr(inner, 'eqns'):
        sizes |= sizes_held(getattr(inner, 'jaxpr', inner))
  return sizes


WIDE = {
  'dense': lambda: zoo.linen(nn.Dense(64), x=(4, 64)),
  'dense_of_one_token': lambda: zoo.linen(nn.Dense(64), x=(64,)),
  'attention': lambda: zoo.linen(nn.MultiHeadDotProductAttention(4), x=(3, 64)),
  'conv': lambda: zoo.linen(nn.Conv(32, (3, 3)), x=(3, 3, 32)),
  'embedding': lambda: zoo.linen(nn.Embed(512, 16), tokens=zoo.ids(512, 4)),
  'tied_embedding': lambda: zoo.plain(
    lambda p, tokens: jnp.tanh(p['e'][tokens]) @ p['e'].T, {'e': (512, 16)}, tokens=zoo.ids(512, 4)
  ),
  'layers': lambda: zoo.plain(
    lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p['w'])[0],
    {'w': (3, 32, 32)},
    x=(4, 32),
  ),
  'time': lambda: zoo.plain(
    lambda p, x: lax.scan(lambda h, x: (jnp.tanh(x + h @ p['w']), None), x[0], x)[0],
    {'w': (64, 64)},
    x=(4, 64),
  ),
  # What is carried is of no example until the body has been seen once.
  'time_from_zero': lambda: zoo.plain(
    lambda p, x: lax.scan(
      lambda h, x: (jnp.tanh(x + h @ p['w']), None), jnp.zeros(64, x.dtype), x
    )[0],
    {'w': (64, 64)},
    x=(4, 64),
  ),
  'shared': lambda: zoo.plain(
    lambda p, x: jnp.tanh(jnp.tanh(x @ p['w']) @ p['w']), {'w': (64, 64)}, x=(2, 64)
  ),
  'remat': lambda: zoo.linen(nn.remat(nn.Dense)(64), x=(4, 64)),
}


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
@pytest.mark.parametrize('name', WIDE)
def test_no_gradient_of_a_whole_matrix_is_held_per_example_but_by_vmap(name, strategy):
  model = WIDE[name]()
  batch = cast(model.make_batch(np.random.default_rng(0), BATCH), np.float32)
  jaxpr = jax.make_jaxpr(
    lambda params, batch: privacy.clipped_sum(
      model.loss_fn, params, batch, clip_norm=1.0, strategy=strategy
    )
  )(cast(model.params, np.float32), batch)
  largest = max(leaf.size for leaf in jax.tree.leaves(model.params))
  assert (max(sizes_held(jaxpr.jaxpr)) >= BATCH * largest) == (strategy == 'vmap')
