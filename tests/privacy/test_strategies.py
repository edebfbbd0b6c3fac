"""Every strategy gives what `vmap` gives, on a zoo of models, and keeps its promises there."""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import pytest
from jax import lax

from dpcap import privacy
from dpcap.privacy import clipping
from tests.privacy import zoo

BATCH, CLIP_NORM = 5, 1.0
STRATEGIES = [name for name in privacy.CLIPPING_STRATEGIES if name != 'vmap']
MARGIN = 1 + clipping.ROUNDING_MARGIN
NAN, INF = float('nan'), float('inf')

# Compiled in float32 too: every way in which norms are computed.
FLOAT32 = (
  'mlp',
  'dense_on_tokens',
  'self_attention',
  'conv_2d',
  'conv_on_large_images',
  'embedding',
  'tied_embedding',
  'norms',
  'scan_over_layers',
  'scan_over_time',
  'augmentation_multiplicity',
)

both_strategies = pytest.mark.parametrize('strategy', STRATEGIES)


class Program(NamedTuple):
  """A model's clipped_sum, compiled for batches of BATCH examples.

  Attributes:
    call: of (batch, mask, scale); the loss is multiplied by scale. Returns numpy arrays.
    warnings: all that came up while it was traced.
  """

  call: Callable[..., clipping.ClippedSum]
  warnings: list[warnings.WarningMessage]


@functools.cache
def program(build, strategy, dtype, in_haste=True) -> Program:
  """One compilation per model (`zoo.entry`), strategy and type of floats."""
  with jax.enable_x64(dtype == np.float64):
    model = build()
    params = cast(model.params, dtype)

    def clipped_sum(params, batch, mask, scale):
      loss_fn = lambda params, example: scale * model.loss_fn(params, example)
      return privacy.clipped_sum(
        loss_fn, params, batch, mask, clip_norm=CLIP_NORM, strategy=strategy
      )

    inputs = cast(model.make_batch(np.random.default_rng(0), BATCH), dtype)
    mask = np.ones(BATCH, bool)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      jitted = jax.jit(clipped_sum, compiler_options=haste() if in_haste else None)
      traced = jitted.trace(params, inputs, mask, dtype(1))
    compiled = traced.lower().compile()

  def call(batch, mask=mask, scale=1.0):
    with jax.enable_x64(dtype == np.float64):
      return jax.tree.map(
        np.asarray, compiled(params, cast(batch, dtype), np.asarray(mask), dtype(scale))
      )

  return Program(call, caught)


@functools.cache
def haste():
  """Compiler options that save three quarters of the time, those of them that jaxlib knows."""
  options = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
    'xla_cpu_use_fusion_emitters': False,
  }

  def is_known(name):
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.jit(lambda x: x, compiler_options={name: options[name]}).lower(0).compile()
      return True

  return {name: value for name, value in options.items() if is_known(name)}


def is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def norm(tree):
  """L2 norm over all leaves, in float64."""
  return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def difference(a, b):
  return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)


def assert_identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(actual, expected, tolerance):
  """`tolerance`: relative, of each norm, factor and loss, and of the whole sum."""
  for name in ('norms', 'factors', 'losses'):
    np.testing.assert_allclose(
      getattr(actual, name), getattr(expected, name), rtol=tolerance, err_msg=name
    )
  jax.tree.map(lambda a, e: np.testing.assert_equal(a.shape, e.shape), actual.sum, expected.sum)
  errors = jax.tree.map(lambda d: float(norm(d)), difference(actual.sum, expected.sum))
  assert norm(errors) <= tolerance * norm(expected.sum), errors


def random_mask(rng):
  """Two examples or more count."""
  return rng.permutation(BATCH) < rng.integers(2, BATCH + 1)


def half_clipped(build, dtype, batch, mask):
  """The scale of the loss at which half of the examples that count are clipped."""
  norms = program(build, 'vmap', dtype).call(batch, mask).norms[mask]
  return CLIP_NORM / np.median(norms[np.isfinite(norms) & (norms > 0)])


def alone(call, batch, scale):
  """What each example contributes by itself."""
  return [call(batch, np.arange(BATCH) == i, scale) for i in range(BATCH)]


# --- Agreement.


@both_strategies
@pytest.mark.parametrize('name', zoo.ZOO)
def test_agrees_with_vmap_in_float64(rng, name, strategy):
  build = zoo.ZOO[name]
  batch, mask = build().make_batch(rng, BATCH), random_mask(rng)
  scale = half_clipped(build, np.float64, batch, mask)
  expected = program(build, 'vmap', np.float64).call(batch, mask, scale)
  actual = program(build, strategy, np.float64).call(batch, mask, scale)
  assert_close(actual, expected, 1e-10)
  assert {leaf.dtype for leaf in jax.tree.leaves(actual.sum)} == {np.dtype(np.float64)}


@both_strategies
@pytest.mark.parametrize('name', FLOAT32)
def test_agrees_in_float32_with_vmap_in_float64(rng, name, strategy):
  build = zoo.ZOO[name]
  batch, mask = build().make_batch(rng, BATCH), random_mask(rng)
  batch = cast(cast(batch, np.float32), np.float64)
  scale = np.float32(half_clipped(build, np.float64, batch, mask))
  expected = program(build, 'vmap', np.float64).call(batch, mask, scale)
  actual = program(build, strategy, np.float32).call(batch, mask, scale)
  assert_close(actual, expected, 1e-5)
  assert {leaf.dtype for leaf in jax.tree.leaves(actual.sum)} == {np.dtype(np.float32)}


@both_strategies
@pytest.mark.parametrize('name', zoo.BFLOAT16)
def test_agrees_with_vmap_where_the_model_computes_in_bfloat16(rng, name, strategy):
  build = zoo.BFLOAT16[name]
  batch, mask = build().make_batch(rng, BATCH), random_mask(rng)
  scale = half_clipped(build, np.float32, batch, mask)
  expected = program(build, 'vmap', np.float32).call(batch, mask, scale)
  actual = program(build, strategy, np.float32).call(batch, mask, scale)
  assert_close(actual, expected, 2e-2)
  assert {leaf.dtype for leaf in jax.tree.leaves(actual.sum)} == {np.dtype(np.float32)}


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


# --- Sensitivity.

SENSITIVE = {name: zoo.ZOO[name] for name in FLOAT32} | zoo.BFLOAT16


@both_strategies
@pytest.mark.parametrize('name', SENSITIVE)
def test_an_example_contributes_at_most_clip_norm(rng, name, strategy):
  build = SENSITIVE[name]
  call, batch = program(build, strategy, np.float32).call, build().make_batch(rng, BATCH)
  dtype = np.float32 if name in zoo.BFLOAT16 else np.float64
  half = half_clipped(build, dtype, batch, np.ones(BATCH, bool))
  whole, ones = call(batch, scale=half), alone(call, batch, half)
  for i, one in enumerate(ones):
    assert norm(one.sum) <= CLIP_NORM * MARGIN
    without = call(batch, np.arange(BATCH) != i, half)
    # Free of C: the rounding of sums in float32.
    assert norm(difference(whole.sum, without.sum)) <= CLIP_NORM * MARGIN + 1e-6 * BATCH
  for scale in half * 10.0 ** rng.uniform(0, 6, 3):
    for one in alone(call, batch, scale):
      assert norm(one.sum) <= CLIP_NORM * MARGIN


class Linear(NamedTuple):
  """A layer that is linear in x; shapes of its parameter, its input and its output."""

  apply: Callable
  w: tuple[int, ...]
  x: tuple[int, ...]
  y: tuple[int, ...]


def _conv(x, w):
  return lax.conv_general_dilated(
    x[None], w, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )[0]


def _over_time(x, w):
  return lax.scan(lambda _, x: (None, x @ w), None, x)[1]


def _look_up(x, w):
  return w[jnp.arange(6) % 3] * x  # what multiplies it is its output's gradient


# Norms from Gram matrices or from products, of parameters used once, often, and at two sites.
LINEAR = {
  'few_tokens': Linear(jnp.dot, (8, 9), (2, 8), (2, 9)),
  'many_tokens': Linear(jnp.dot, (3, 4), (16, 3), (16, 4)),
  'one_token': Linear(jnp.dot, (7, 8), (7,), (8,)),
  'few_patches': Linear(_conv, (2, 2, 3, 16), (2, 3, 3), (1, 2, 16)),
  'many_patches': Linear(_conv, (2, 2, 1, 2), (4, 5, 1), (3, 4, 2)),
  'lookup': Linear(_look_up, (3, 5), (6, 5), (6, 5)),
  'scan': Linear(_over_time, (8, 8), (2, 8), (2, 8)),
  'long_scan': Linear(_over_time, (3, 3), (12, 3), (12, 3)),
  'two_sites': Linear(lambda x, w: jnp.concatenate([x[:1] @ w, x[1:] @ w]), (9, 8), (2, 9), (2, 8)),
  'bias': Linear(lambda x, w: x + w, (4,), (6, 4), (6, 4)),
}


def _linear_model(dtype) -> zoo.Model:
  """All linear layers beside each other; inputs and output gradients are the example.

  A test sets those of one layer and leaves zeros for the others.
  """

  def loss_fn(params, example):
    terms = [
      jnp.sum(g.astype(jnp.float32) * layer.apply(x.astype(dtype), params[name].astype(dtype)))
      for name, layer in LINEAR.items()
      for x, g in [example[name]]
    ]
    return sum(terms)

  def make_batch(rng, size):
    del rng
    return {
      name: (np.zeros((size, *layer.x)), np.zeros((size, *layer.y)))
      for name, layer in LINEAR.items()
    }

  params = {name: np.zeros(layer.w) for name, layer in LINEAR.items()}
  return zoo.Model(loss_fn, params, make_batch)


linear_float32 = functools.cache(functools.partial(_linear_model, jnp.float32))
linear_bfloat16 = functools.cache(functools.partial(_linear_model, jnp.bfloat16))


def _constant(mantissa):
  """All entries the same: all products round the same way."""

  def make(rng, x, g):
    k = 2.0 ** rng.integers(-6, 7, (BATCH, 2))
    fill = lambda y, k: mantissa * k.reshape(-1, *[1] * (y.ndim - 1)) + 0 * y
    return fill(x, k[:, 0]), fill(g, k[:, 1])

  return make


def _cancelling(rest):
  """Tokens in pairs whose terms cancel up to `rest`."""

  def make(rng, x, g):
    pair = lambda y, sign: np.where(
      np.arange(y.shape[1]).reshape(-1, *[1] * (y.ndim - 2)) % 2, sign * y[:, :1], y[:, :1]
    )
    x, g = rng.normal(size=x.shape), rng.normal(size=g.shape)
    if x.ndim == 2:
      return x, g
    return pair(x, 1), pair(g, -(1 + rest))

  return make


def _of_all_sizes(rng, x, g):
  sizes = lambda y: rng.normal(size=y.shape) * np.exp(3 * rng.normal(size=y.shape))
  return sizes(x), sizes(g)


ADVERSARIAL = {
  'equal mantissas of float32': _constant(1.00390625),
  'equal mantissas just above a bfloat16': _constant(1 + 2**-7),
  'equal mantissas just below a bfloat16': _constant(2 - 2**-7),
  'equal mantissas that bfloat16 rounds': _constant(1 + 2**-8 + 2**-12),
  'all sizes': _of_all_sizes,
  'cancels to nothing': _cancelling(0),
  'cancels to 1e-2': _cancelling(2**-6),
  'cancels to 1e-3': _cancelling(1e-3),
  'cancels to 1e-5': _cancelling(1e-5),
}


@both_strategies
@pytest.mark.parametrize('kind', ADVERSARIAL)
@pytest.mark.parametrize('build', [linear_float32, linear_bfloat16], ids=['float32', 'bfloat16'])
def test_an_adversary_contributes_at_most_clip_norm(rng, build, kind, strategy):
  call = program(build, strategy, np.float32, in_haste=False).call
  exceeded = {}
  for layer in LINEAR:
    batch = build().make_batch(rng, BATCH)
    batch[layer] = ADVERSARIAL[kind](rng, *batch[layer])
    batch[layer] = tuple(np.float32(y) for y in batch[layer])
    for scale in (1.0, 1e3, 1e7):
      largest = max(norm(one.sum) for one in alone(call, batch, scale))
      if not largest <= CLIP_NORM * MARGIN:
        exceeded[layer, scale] = largest / CLIP_NORM - 1
      # Bounds on rounding are tight enough to leave most of a gradient.
      if 'cancels' not in kind and scale == 1e7:
        assert largest >= CLIP_NORM * (1 - 0.05), layer
  assert not exceeded


@both_strategies
@pytest.mark.parametrize('size', [1e-14, 1e14])
def test_activations_and_gradients_of_very_different_sizes_are_no_overflow(rng, strategy, size):
  expect, call = (
    program(linear_float32, s, np.float32, in_haste=False).call for s in ('vmap', strategy)
  )
  for layer in set(LINEAR) - {'bias', 'lookup'}:
    batch = linear_float32().make_batch(rng, BATCH)
    x, g = batch[layer]
    batch[layer] = rng.normal(size=x.shape) * size, rng.normal(size=g.shape) / size
    assert_close(call(batch), expect(batch), 1e-5)


@both_strategies
def test_a_row_that_does_not_exist_cancels_nothing(strategy):
  # What is read past the end has no gradient, however it is filled: clipped to the last row
  # it would cancel that row's in the norm, but not in the sum.
  batch = {'ids': jnp.array([[4, 7]]), 'gradients': jnp.array([[[100.0], [-100.0]]])}
  result = privacy.clipped_sum(
    lambda p, e: jnp.sum(p[e['ids']] * e['gradients']),
    jnp.ones((5, 1)),
    batch,
    clip_norm=CLIP_NORM,
    strategy=strategy,
  )
  assert norm(result.sum) <= CLIP_NORM * MARGIN


# --- Unusable examples.


def spoil(batch, rows, value):
  """Every float of these rows becomes `value` times itself."""
  shaped = lambda x: rows.reshape(-1, *[1] * (x.ndim - 1))
  change = lambda x: np.where(shaped(x), value * x, x) if is_float(x) else x
  with np.errstate(invalid='ignore'):
    return jax.tree.map(change, batch)


def has_floats(name):
  model = zoo.ZOO[name]()
  return any(is_float(x) for x in jax.tree.leaves(model.make_batch(np.random.default_rng(0), 1)))


def check_unusable_is_masked(call, batch, bad, value):
  """A spoilt example is what a masked one is, to the bit."""
  masked = call(batch, ~bad)
  spoilt = call(spoil(batch, bad, value))
  np.testing.assert_array_equal(spoilt.norms[~bad], masked.norms[~bad])
  np.testing.assert_array_equal(spoilt.factors[~bad], masked.factors[~bad])
  np.testing.assert_array_equal(spoilt.losses[~bad], masked.losses[~bad])
  if not np.isfinite(spoilt.norms[bad]).all():
    assert_identical(spoilt.sum, masked.sum)
    assert not spoilt.factors[bad].any()
  by_itself = call(spoil(batch, bad, value), bad)
  assert norm(by_itself.sum) <= bad.sum() * CLIP_NORM * MARGIN
  if not np.isfinite(by_itself.norms[bad]).all():
    assert norm(by_itself.sum) == 0
  assert_identical(call(spoil(batch, bad, value), ~bad), masked)
  return spoilt.norms[bad]


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
@pytest.mark.parametrize('value', [NAN, INF, 1e15, 1e30])
@pytest.mark.parametrize('name', sorted(set(FLOAT32) - {'tied_embedding'}))
def test_an_unusable_example_is_as_if_masked_in_float32(rng, name, strategy, value):
  call = program(zoo.ZOO[name], strategy, np.float32).call
  batch = zoo.ZOO[name]().make_batch(rng, BATCH)
  bad = rng.permutation(BATCH) < 2
  check_unusable_is_masked(call, cast(batch, np.float32), bad, value)


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
