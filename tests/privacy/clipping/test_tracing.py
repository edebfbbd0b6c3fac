"""Losses that could see other examples than their own are refused, whatever the strategy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dpcap import privacy

every_strategy = pytest.mark.parametrize('strategy', ['auto', *privacy.CLIPPING_STRATEGIES])


def clip(loss_fn, params, batch, strategy, check_vma=False):
  """clipped_sum inside of a shard_map over the axis 'devices', as a caller may have it."""
  mesh = jax.make_mesh((1,), ('devices',), axis_types=(AxisType.Auto,))
  spec = PartitionSpec('devices')

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(PartitionSpec(), spec),
    out_specs=PartitionSpec(),
    check_vma=check_vma,
  )
  def run(params, batch):
    summed = privacy.clipped_sum(loss_fn, params, batch, clip_norm=1.0, strategy=strategy).sum
    return jax.tree.map(lambda x: jax.lax.psum(x, 'devices'), summed)

  return run(params, batch)


COLLECTIVES = {
  'psum': lambda x: jax.lax.psum(x, 'devices'),
  'pmean': lambda x: jax.lax.pmean(x, 'devices'),
  'pmax': lambda x: jax.lax.stop_gradient(jax.lax.pmax(x, 'devices')) * x,
  'all_gather': lambda x: jnp.sum(jax.lax.all_gather(x, 'devices')),
  'ppermute': lambda x: jax.lax.ppermute(x, 'devices', [(0, 0)]),
  'inside of a scan': lambda x: jax.lax.scan(
    lambda c, _: (jax.lax.pmean(c, 'devices'), None), x, None, length=2
  )[0],
  'inside of a jit': jax.jit(lambda x: jax.lax.pmean(x, 'devices')),
}


@every_strategy
@pytest.mark.parametrize('name', COLLECTIVES)
def test_collectives_over_a_named_axis_are_refused(strategy, name):
  loss_fn = lambda p, x: jnp.square(COLLECTIVES[name](jnp.sum(p * x)))
  with pytest.raises(privacy.MixedExamplesError, match='named axis devices'):
    clip(loss_fn, jnp.ones(3), jnp.ones((2, 3)), strategy)


@every_strategy
def test_a_batch_norm_over_devices_is_refused(strategy):
  model = nn.BatchNorm(use_running_average=False, axis_name='devices')
  x = jnp.ones((2, 4, 3))
  variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x[0])

  def loss_fn(params, x):
    y, _ = model.apply(variables | {'params': params}, x, mutable=['batch_stats'])
    return jnp.sum(y**3)

  with pytest.raises(privacy.MixedExamplesError, match='named axis devices'):
    clip(loss_fn, variables['params'], x, strategy)


@every_strategy
def test_an_axis_that_the_loss_named_itself_is_its_own(strategy):
  def loss_fn(p, views):  # of one example
    centred = jax.vmap(lambda x: x - jax.lax.pmean(x, 'views'), axis_name='views')(views)
    return jnp.sum(jnp.square(centred @ p))

  x = np.float32(np.random.default_rng(0).normal(size=(2, 4, 3)))
  clip(loss_fn, jnp.ones((3, 2)), x, strategy)


def mixing(axis_size, in_batched, x):
  del axis_size, in_batched
  return jnp.broadcast_to(jnp.mean(x, 0), x.shape), True


@every_strategy
def test_batching_rules_of_ones_own_are_refused_by_name(strategy):
  mean = jax.custom_batching.custom_vmap(lambda x: x)
  mean.def_vmap(mixing)
  with pytest.raises(privacy.MixedExamplesError, match='rule of its own, mixing'):
    privacy.clipped_sum(
      lambda p, x: jnp.sum(p * mean(x)), jnp.ones(3), jnp.ones((2, 3)), clip_norm=1.0,
      strategy=strategy,
    )  # fmt: skip


def hidden_in(kind):
  """The identity, with a batching rule of its own where only the gradient shows it."""
  mean = jax.custom_batching.custom_vmap(lambda x: x)
  mean.def_vmap(mixing)
  if kind == 'custom_jvp':
    function = jax.custom_jvp(lambda x: x)
    function.defjvp(lambda xs, dxs: (mean(xs[0]), dxs[0]))
  else:
    function = jax.custom_vjp(lambda x: x)
    forward = mean if kind == 'forward of custom_vjp' else lambda x: x
    backward = mean if kind == 'backward of custom_vjp' else lambda x: x
    function.defvjp(lambda x: (forward(x), None), lambda _, g: (backward(g),))
  return function


@every_strategy
@pytest.mark.parametrize(
  'kind', ['custom_jvp', 'forward of custom_vjp', 'backward of custom_vjp']
)
def test_rules_of_differentiation_hide_nothing(strategy, kind):
  function = hidden_in(kind)
  with pytest.raises(privacy.MixedExamplesError, match='rule of its own, mixing'):
    privacy.clipped_sum(
      lambda p, x: jnp.sum(function(p * x)), jnp.ones(3), jnp.ones((2, 3)), clip_norm=1.0,
      strategy=strategy,
    )  # fmt: skip


@every_strategy
@pytest.mark.parametrize('method', ['expand_dims', 'broadcast_all', 'sequential'])
def test_calls_out_of_jax_see_one_example_at_a_time(strategy, method):
  def loss_fn(p, x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y = jax.pure_callback(lambda x: np.asarray(x) * 2, like, x, vmap_method=method)
    return jnp.sum(p * y)

  run = lambda: privacy.clipped_sum(
    loss_fn, jnp.ones(3), jnp.ones((2, 3)), clip_norm=1.0, strategy=strategy
  )
  if method == 'sequential':
    np.testing.assert_allclose(run().norms, np.sqrt(12) * np.ones(2), rtol=1e-6)
  else:
    with pytest.raises(privacy.MixedExamplesError, match=f"vmap_method='{method}'"):
      run()


@every_strategy
def test_a_shard_map_that_checks_what_varies_is_refused_in_words(strategy):
  with pytest.raises(ValueError, match='check_vma=False'):
    clip(lambda p, x: jnp.sum(p * x), jnp.ones(3), jnp.ones((2, 3)), strategy, check_vma=True)


def test_plain_sum_refuses_them_too():
  mean = jax.custom_batching.custom_vmap(lambda x: x)
  mean.def_vmap(mixing)
  with pytest.raises(privacy.MixedExamplesError):
    privacy.plain_sum(lambda p, x: jnp.sum(p * mean(x)), jnp.ones(3), jnp.ones((2, 3)))


def test_the_check_sees_a_loss_that_mixes_behind_the_trace(monkeypatch):
  monkeypatch.setattr('dpcap.privacy.clipping.tracing._way_around', lambda eqn, axes: None)
  mean = jax.custom_batching.custom_vmap(lambda x: x)
  mean.def_vmap(mixing)
  batch = np.float32(np.random.default_rng(0).normal(size=(2, 3)))
  with pytest.raises(privacy.ClippingMismatch, match='change with its company'):
    privacy.check_clipping(
      lambda p, x: jnp.sum(p * mean(x)), jnp.ones(3), batch, strategy='vmap'
    )


@every_strategy
def test_a_rule_that_takes_one_example_after_the_other_is_known(strategy):
  twice = jax.custom_batching.sequential_vmap(lambda x: 2 * x)
  loss_fn = lambda p, x: jnp.sum(p * jax.lax.stop_gradient(twice(jax.lax.stop_gradient(x))))
  result = privacy.clipped_sum(
    loss_fn, jnp.ones(3), jnp.ones((2, 3)), clip_norm=1.0, strategy=strategy
  )
  np.testing.assert_allclose(result.norms, np.sqrt(12) * np.ones(2), rtol=1e-6)


@every_strategy
@pytest.mark.parametrize('remat', [False, True])
def test_numbers_of_a_shared_generator_are_refused(strategy, remat):
  def loss_fn(p, x):
    return jnp.sum(p * x * jax.lax.rng_uniform(0.0, 1.0, x.shape))

  with pytest.raises(privacy.MixedExamplesError, match='rng_uniform'):
    privacy.clipped_sum(
      jax.checkpoint(loss_fn) if remat else loss_fn,
      jnp.ones(3),
      jnp.ones((2, 3)),
      clip_norm=1.0,
      strategy=strategy,
    )


def noisy_loss(impl):
  """A loss of an example that brings its key along."""

  def loss_fn(p, example):
    # Keys of threefry2x32 are half as long.
    data = example['key'][:2] if impl == 'threefry2x32' else example['key']
    noise = jax.random.normal(jax.random.wrap_key_data(data, impl=impl), p.shape)
    return jnp.sum(p * example['x'] * noise)

  return loss_fn


def examples_with_keys():
  rng = np.random.default_rng(0)
  key = rng.integers(2**32, size=(4, 4), dtype=np.uint32)
  return {'x': np.float32(rng.normal(size=(4, 3))), 'key': key}


@every_strategy
@pytest.mark.parametrize('impl', ['rbg', 'unsafe_rbg'])
def test_keys_that_draw_for_the_whole_batch_are_refused(strategy, impl):
  with pytest.raises(privacy.MixedExamplesError, match='random_bits of key<u?rbg>'):
    privacy.clipped_sum(
      noisy_loss(impl), jnp.ones(3), examples_with_keys(), clip_norm=1.0, strategy=strategy
    )


def test_the_generator_that_those_keys_are_made_of_is_refused_too():
  def loss_fn(p, example):
    _, bits = jax.lax.rng_bit_generator(example['key'], p.shape)
    return jnp.sum(p * example['x'] * bits)

  with pytest.raises(privacy.MixedExamplesError, match='rng_bit_generator'):
    privacy.clipped_sum(loss_fn, jnp.ones(3), examples_with_keys(), clip_norm=1.0)


@every_strategy
def test_an_example_draws_from_its_own_key(strategy):
  batch = examples_with_keys()

  @jax.jit
  def norms_of(batch):
    loss_fn = noisy_loss('threefry2x32')
    return privacy.clipped_sum(loss_fn, jnp.ones(3), batch, clip_norm=1.0, strategy=strategy).norms

  others = batch | {'key': batch['key'] ^ np.uint32([[1], [1], [1], [0]])}
  before, after = norms_of(batch), norms_of(others)
  assert before[3] == after[3]
  assert np.all(before[:3] != after[:3])


def test_the_check_sees_examples_that_draw_from_the_key_of_the_first(monkeypatch):
  monkeypatch.setattr('dpcap.privacy.clipping.tracing._way_around', lambda eqn, axes: None)
  with pytest.raises(privacy.ClippingMismatch, match='change with its company'):
    privacy.check_clipping(
      noisy_loss('rbg'), jnp.ones(3), examples_with_keys(), strategy='vmap'
    )
