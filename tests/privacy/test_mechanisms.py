"""Noise: its distribution, its independence, and that devices do not change it."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpcap import privacy

REPOSITORY = pathlib.Path(__file__).parents[2]
# Standard deviations that a right program exceeds once in 2.5e10 draws of a statistic.
SIGMAS = 6.7


def make_key(rng):
  return jax.random.wrap_key_data(jnp.asarray(rng.integers(2**32, size=2), jnp.uint32))


@functools.cache
def adder(noise_multiplier, clip_norm):
  mechanism = privacy.MECHANISMS['gaussian'](noise_multiplier, clip_norm)
  return jax.jit(lambda key, step, clipped: mechanism.add_noise(key, step, clipped, ())[0])


def draw(key, step, shapes, noise_multiplier=1.0, clip_norm=1.0):
  """The noise on zeros of the given shapes."""
  return adder(noise_multiplier, clip_norm)(key, step, [jnp.zeros(s) for s in shapes])


def assert_uncorrelated(x, y):
  x, y = np.ravel(x), np.ravel(y)
  assert abs(np.corrcoef(x, y)[0, 1]) * x.size**0.5 < SIGMAS


@pytest.mark.parametrize(
  'noise_multiplier, clip_norm', [(1.0, 1.0), (0.728, 1.0), (0.5, 0.1), (3.0, 20.0)]
)
def test_noise_is_gaussian_of_standard_deviation_sigma_times_clip_norm(
  rng, noise_multiplier, clip_norm
):
  (noise,) = draw(make_key(rng), 3, [(1000, 1000)], noise_multiplier, clip_norm)
  z = np.asarray(noise, np.float64).ravel() / (noise_multiplier * clip_norm)
  assert abs(z.mean()) * z.size**0.5 < SIGMAS
  assert abs(np.mean(z**2) - 1) * (z.size / 2) ** 0.5 < SIGMAS  # 1% of sigma
  assert scipy.stats.kstest(z[:200_000], 'norm').pvalue > 1e-10


def test_noise_is_added_to_the_sum(rng):
  key, shapes = make_key(rng), [(3, 4), (), (5,)]
  clipped = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  noisy = adder(2.0, 0.5)(key, 7, clipped)
  for noisy_leaf, leaf, noise in zip(noisy, clipped, draw(key, 7, shapes, 2.0, 0.5)):
    np.testing.assert_allclose(noisy_leaf, leaf + noise, atol=1e-6)


def test_noise_keeps_structure_shape_and_float32(rng):
  clipped = {'a': jnp.ones((2, 3)), 'b': {'c': jnp.ones(())}}
  noisy, state = privacy.MECHANISMS['gaussian'](1.0, 1.0).add_noise(make_key(rng), 0, clipped, ())
  assert jax.tree.structure(noisy) == jax.tree.structure(clipped)
  assert jax.tree.map(jnp.shape, noisy) == jax.tree.map(jnp.shape, clipped)
  assert {leaf.dtype for leaf in jax.tree.leaves(noisy)} == {np.dtype(np.float32)}
  assert state == ()


def test_noise_has_the_full_resolution_of_float32(rng):
  (noise,) = draw(make_key(rng), 0, [(200_000,)])
  # bfloat16 noise would take some thousands of values.
  assert np.unique(noise).size > 190_000


def test_coordinates_are_independent(rng):
  (noise,) = draw(make_key(rng), 0, [(600, 600)])
  noise = np.asarray(noise)
  assert_uncorrelated(noise[:, 1:], noise[:, :-1])
  assert_uncorrelated(noise[1:], noise[:-1])
  assert_uncorrelated(noise[:300], noise[300:])
  assert_uncorrelated(noise[:, :300], noise[:, 300:])
  assert_uncorrelated(noise[:, 1:] ** 2, noise[:, :-1] ** 2)


def test_steps_and_leaves_and_keys_are_independent(rng):
  shapes = [(300, 300)] * 3
  keys = make_key(rng), make_key(rng)
  noises = [
    np.asarray(leaf) for key in keys for step in range(3) for leaf in draw(key, step, shapes)
  ]
  for i, one in enumerate(noises):
    for other in noises[:i]:
      assert_uncorrelated(one, other)


def test_no_number_comes_twice_in_many_steps_and_leaves_of_equal_shape(rng):
  key = make_key(rng)
  rows = np.concatenate([draw(key, step, [(4,)] * 5) for step in range(40)])
  assert np.unique(rows, axis=0).shape == (200, 4)


def test_noise_is_a_function_of_key_and_step(rng):
  key, shapes = make_key(rng), [(7,), (2, 3)]
  first = draw(key, 5, shapes)
  draw(key, 6, shapes)
  for again in (draw(key, 5, shapes), draw(key, jnp.int32(5), shapes)):
    jax.tree.map(np.testing.assert_array_equal, first, again)
  assert np.all(first[0] != draw(key, 6, shapes)[0])
  assert np.all(first[0] != draw(make_key(rng), 5, shapes)[0])


_SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpcap import privacy
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ('d',))
specs = [PartitionSpec('d'), PartitionSpec(None, 'd'), PartitionSpec(), PartitionSpec('d')]
shardings = [NamedSharding(mesh, spec) for spec in specs]
zeros = [jnp.zeros(s) for s in ((16, 24), (3, 40), (5,), (16, 24))]
key = jax.random.wrap_key_data(jnp.array([int(sys.argv[2]), int(sys.argv[3])], jnp.uint32))
mechanism = privacy.MECHANISMS['gaussian'](1.5, 2.0)
noise = jax.jit(
    lambda key, sums: mechanism.add_noise(key, 11, sums, ())[0], out_shardings=shardings
)(key, jax.device_put(zeros, shardings))
assert [leaf.sharding.spec for leaf in noise] == specs
np.savez(sys.argv[1], *noise)
"""


def test_eight_devices_draw_the_numbers_of_one(rng, tmp_path):
  words = [int(word) for word in rng.integers(2**32, size=2)]
  path = tmp_path / 'noise.npz'
  subprocess.run(
    [sys.executable, '-c', _SHARDED, path, *map(str, words)],
    check=True,
    cwd=REPOSITORY,
    env=os.environ
    | {
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8',
      'JAX_PLATFORMS': 'cpu',
    },
  )
  key = jax.random.wrap_key_data(jnp.array(words, jnp.uint32))
  expected = draw(key, 11, [(16, 24), (3, 40), (5,), (16, 24)], 1.5, 2.0)
  with np.load(path) as actual:
    for name, leaf in zip(actual.files, expected, strict=True):
      np.testing.assert_array_equal(actual[name], leaf)


def test_no_noise_releases_the_sum_as_it_is(rng):
  mechanism = privacy.MECHANISMS['none'](0.0, float('inf'))
  clipped = {'a': jnp.asarray(rng.normal(size=5))}
  state = mechanism.init(make_key(rng), 0, clipped)
  noisy, state = mechanism.add_noise(make_key(rng), 0, clipped, state)
  np.testing.assert_array_equal(noisy['a'], clipped['a'])
  assert state == ()
