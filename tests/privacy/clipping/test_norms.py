"""The claim of norms.py, against float64: what rounding takes from a norm and adds to a sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy.clipping import gram, norms, outer_products
from dpcap.privacy.clipping.outer_products import Products, Rows
from dpcap.privacy.clipping.rounding import tree_depth, tree_sum
from dpcap.privacy.clipping.tracing import trace_loss
from dpcap.privacy.clipping.uses import find_uses
from dpcap.privacy.clipping.weighted_gradients import weighted_gradient
from tests.privacy.clipping.programs import CLIP_NORM, MARGIN, norm

TOKENS, INPUTS, OUTPUTS, ROWS = 6, 37, 41, 50


def products(p, e):
  return jnp.sum((e['x'] @ p) * e['g'])


def lookups(p, e):
  return jnp.sum(p[e['rows']] * e['h'])


def both(p, e):
  """A parameter (ROWS, OUTPUTS) whose rows are looked up and which is multiplied with."""
  return products(p, e) + lookups(p, e)


def make_batch(rng, kind, inputs, size=3):
  """Tokens that cancel to a rest of 1e-7 or less but for kind 'random'."""
  normal = lambda *shape: rng.normal(size=(size, *shape))
  x, g, h = normal(TOKENS, inputs), normal(TOKENS, OUTPUTS), normal(TOKENS, OUTPUTS)
  rows = rng.integers(ROWS, size=(size, TOKENS))
  if kind != 'random':
    if kind == 'flat':
      x, g, h = (y[:, :1, :1] + 0 * y for y in (x, g, h))
    sign = np.where(np.arange(TOKENS) % 2, -1.0, 1.0)[:, None]
    x = np.repeat(x[:, ::2], 2, 1) * (1 + 1e-7 * (sign > 0))
    g, h = (np.repeat(y[:, ::2], 2, 1) * sign for y in (g, h))
    rows = np.repeat(rows[:, ::2], 2, 1)
  cast = lambda y: np.float32(y * 10.0 ** rng.uniform(-3, 3))
  return {'x': cast(x), 'g': cast(g), 'rows': rows.astype(np.int32), 'h': cast(h)}


def exactly(loss_fn, batch, shape):
  """Gradients (B, *shape) in float64."""
  x, g, h = (np.float64(batch[name]) for name in 'xgh')
  total = np.zeros((len(x), *shape))
  if loss_fn is not lookups:
    total += np.einsum('bti,bto->bio', x, g)
  if loss_fn is not products:
    for b, rows in enumerate(batch['rows']):
      np.add.at(total[b], rows, h[b])
  return total


def group_of(loss_fn, shape, batch):
  """The sites of the loss's parameter, and what each is fed and gets back."""
  params = jax.ShapeDtypeStruct(shape, jnp.float32)
  (group,) = find_uses(trace_loss(loss_fn, params, batch), params).groups
  is_lookup = [site.eqn.primitive.name == 'gather' for site in group]
  xs = [batch['rows'][..., None] if lookup else batch['x'] for lookup in is_lookup]
  gs = [batch['h'] if lookup else batch['g'] for lookup in is_lookup]
  return group, list(map(jnp.asarray, xs)), list(map(jnp.asarray, gs))


# Everything at once; slices, loops over slices with and without a rest; rows block by block.
SETTINGS = {
  'at once': {},
  'slices': {'_SLICE': 8, '_SLICES_AT_ONCE': 8},
  'loops': {'_SLICE': 4, '_SLICES_AT_ONCE': 2},
  'blocks': {'MAX_TEMPORARY_BYTES': 4 * 6 * TOKENS * 2},
}


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('loss_fn', [products, lookups, both])
def test_norms_and_sums_are_off_by_no_more_than_is_said(rng, monkeypatch, loss_fn, setting):
  for name, value in SETTINGS[setting].items():
    monkeypatch.setattr(gram if hasattr(gram, name) else outer_products, name, value)
  inputs = INPUTS if loss_fn is products else ROWS
  shape, like = (inputs, OUTPUTS), jnp.zeros((inputs, OUTPUTS))
  group, _, _ = group_of(loss_fn, shape, make_batch(rng, 'random', inputs))

  @jax.jit
  def run(xs, gs, weights):
    total = sum(
      weighted_gradient(site, x, g, weights, like) for site, x, g in zip(group, xs, gs)
    )
    return norms.squared_norm(group, xs, gs), total

  for kind in ('random', 'cancelling', 'flat') * 5:
    batch = make_batch(rng, kind, inputs)
    _, xs, gs = group_of(loss_fn, shape, batch)
    exact = exactly(loss_fn, batch, shape)
    for b in range(len(exact)):
      weight = np.float32(10.0 ** rng.uniform(-5, 5))
      weights = np.where(np.arange(len(exact)) == b, weight, 0).astype(np.float32)
      found, total = jax.device_get(run(xs, gs, weights))
      squares = np.sum(exact[b] ** 2)
      assert squares <= np.float64(found.value[b]) + found.error[b]
      off = np.linalg.norm(np.float64(total) - np.float64(weight) * exact[b])
      assert off <= np.float64(weight) * np.sqrt(np.float64(found.rounding[b]))
      if kind == 'random':
        assert found.error[b] <= 1e-4 * squares and found.rounding[b] <= 1e-9 * squares
        np.testing.assert_allclose(found.value[b], squares, rtol=1e-5)


@pytest.mark.parametrize('tokens, inputs, outputs', [(16, 192, 192), (40, 192, 576), (2, 768, 768)])
def test_ordinary_examples_lose_little(rng, tokens, inputs, outputs):
  x = rng.normal(size=(2, tokens, inputs)) + 1  # as activations: with something in common
  g = rng.normal(size=(2, tokens, outputs))
  batch = {'x': np.float32(x), 'g': np.float32(g)}
  params = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
  (group,) = find_uses(trace_loss(products, params, batch), params).groups
  found = jax.jit(lambda x, g: norms.squared_norm(group, [x], [g]))(batch['x'], batch['g'])
  norm = np.sqrt(np.float64(found.value))
  lost = np.float64(found.error) / found.value / 2 + np.sqrt(np.float64(found.rounding)) / norm
  # ROUNDING_MARGIN takes up the first 8e-6 of it.
  assert (lost <= 7e-5).all()


# --- The worst that the model of arithmetic allows.

U = 2.0**-24  # of float32


@pytest.mark.parametrize('at_once', [1, 4])  # in a loop over slices, and without
def test_slices_of_opposite_signs_are_bounded_each_by_itself(monkeypatch, at_once):
  monkeypatch.setattr(gram, '_SLICES_AT_ONCE', at_once)
  size = gram._SLICE
  # A large term first: every partial sum of a slice is nearly the whole slice.
  slice_ = np.float32([1, *np.full(size - 1, 1e-4)])
  x = np.concatenate([slice_, slice_])[None]
  y = np.concatenate([slice_, -slice_])[None]
  found = gram.gram_matrix(jnp.asarray(x), jnp.asarray(y))
  partial_sums = 2 * np.sum(np.cumsum(np.float64(slice_) ** 2)[1:])
  assert found.error[0, 0] >= U * partial_sums


def test_slices_are_bounded_as_often_as_they_are_added(monkeypatch):
  monkeypatch.setattr(gram, '_SLICE', 1)
  monkeypatch.setattr(gram, '_SLICES_AT_ONCE', 1)
  # A large one first: every addition rounds it.
  slices = np.float32([1, *np.full(99, 1e-2)])[None]
  found = gram.gram_matrix(jnp.asarray(slices), jnp.asarray(slices))
  partial_sums = np.sum(np.cumsum(np.float64(slices) ** 2)[1:])
  assert found.error[0, 0] >= U * partial_sums


def test_terms_of_a_norm_are_bounded_as_often_as_they_are_added():
  tokens = 100
  # One product of two tokens is nearly all: it is rounded on its whole way up the tree.
  g = jnp.float32([1, *np.full(tokens - 1, 1e-4)])[None, :, None]
  found = norms._of_unit([Products(jnp.ones((1, tokens, 1)), g)])
  assert found.error >= U * tree_depth(tokens**2)


def test_products_and_a_lookup_that_cancel_are_bounded_each_by_itself():
  tokens = 100
  g = np.float32([1, *np.full(tokens - 1, 1e-4)])[:, None]
  products = Products(jnp.ones((1, tokens, 1)), jnp.asarray(g)[None])
  rows = Rows(jnp.zeros(1, jnp.int32), -jnp.sum(jnp.asarray(g), keepdims=True)[:, :1])
  partial_sums = np.sum(np.cumsum(np.float64(g))[1:])
  assert np.sqrt(norms._of_unit([products, rows]).rounding) >= U * partial_sums


def test_a_scan_of_many_layers_adds_up_as_many_squares():
  layers = 1024

  def loss_fn(p, example):
    body = lambda y, wx: (y + jnp.sum(wx[1] @ wx[0]), None)
    return jax.lax.scan(body, jnp.float32(0), (p, example))[0]

  # Each square is just lost where it is added to 1.
  x = np.full((1, layers, 1, 1), np.sqrt(0.49 * 2 * U), np.float32)
  x[0, -1] = 1
  for strategy in privacy.CLIPPING_STRATEGIES:
    result = privacy.clipped_sum(
      loss_fn, jnp.ones((layers, 1, 1)), x, clip_norm=CLIP_NORM / 100, strategy=strategy
    )
    assert norm(result.sum) <= CLIP_NORM / 100 * MARGIN


def test_what_is_formed_is_formed_once_for_norm_and_sum(rng, monkeypatch):
  formed, times = outer_products.formed, []

  def formed_differently_each_time(*args):
    times.append(None)
    return formed(*args) * (1 + 0.1 * len(times))

  monkeypatch.setattr(outer_products, 'formed', formed_differently_each_time)
  x = np.float32(rng.normal(size=(1, 8, 3)))
  for strategy in privacy.CLIPPING_STRATEGIES:
    result = privacy.clipped_sum(
      lambda p, x: jnp.sum((x @ p) ** 2), jnp.ones((3, 2)), x, clip_norm=CLIP_NORM,
      strategy=strategy,
    )  # fmt: skip
    assert norm(result.sum) == pytest.approx(CLIP_NORM, rel=1e-4)


@pytest.mark.parametrize('strategy', ['bookkeeping', 'ghost'])
@pytest.mark.parametrize('size', [1.5e17, 1.5e16])
def test_weights_that_make_small_entries_vanish_are_counted(strategy, size):
  tokens, inputs, outputs, a = 400, 1000, 1100, -1.05e-8
  x, g = np.zeros((1, tokens + 2, inputs)), np.zeros((1, tokens + 2, outputs))
  # Entries that vanish once they are weighed, one token that cancels them, and a large one.
  x[0, :tokens], g[0, :tokens] = a, size
  x[0, tokens], g[0, tokens] = 1.0, -tokens * a * size
  x[0, -1], g[0, -1] = 1 / np.sqrt(inputs), 1e18 / np.sqrt(outputs)
  batch = {'x': jnp.float32(x), 'g': jnp.float32(g)}
  result = jax.jit(
    lambda batch: privacy.clipped_sum(
      products, jnp.zeros((inputs, outputs)), batch, clip_norm=1e-12, strategy=strategy
    )
  )(batch)
  assert norm(result.sum) <= 1e-12 * MARGIN


@pytest.mark.parametrize('sign', [-1, 1])
def test_a_tree_sum_that_overflows_is_not_finite(sign):
  x = jnp.full(100, sign * 3e38)
  assert not np.isfinite(tree_sum(x))
  assert not np.isfinite(tree_sum(jnp.concatenate([x, -x])))
