"""Digests: of every bit in its place, the same however it is computed."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy import digests

_MASK = 2**32 - 1


def _of(tree):
  return np.asarray(privacy.digest(tree))


def _mix(h):
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    h = (h ^ h >> shift) * factor & _MASK
  return h


def test_is_what_its_docstring_says():
  """Element by element, in Python's integers."""
  tree = {'a': np.array([[1.5, -2.0, 0.0], [np.nan, 3e-40, -0.0]], np.float32), 'b': np.float32(7)}
  total = [0] * 4
  for name, leaf in (("['a']", tree['a']), ("['b']", tree['b'])):
    salts = np.frombuffer(hashlib.sha256(name.encode()).digest(), '<u4')
    for place, bits in enumerate(leaf.ravel().view(np.uint32).tolist()):
      for lane in range(4):
        total[lane] += _mix(_mix(place + int(salts[lane]) & _MASK) ^ bits)
  assert _of(tree).tolist() == [lane & _MASK for lane in total]
  assert digests.as_text(privacy.digest(tree)) == ''.join(f'{x & _MASK:08x}' for x in total)


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'bfloat16', 'float16', 'int8', 'uint32'])
def test_every_bit_of_every_element_changes_every_lane(dtype):
  unsigned = np.dtype(f'u{jnp.dtype(dtype).itemsize}')
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**63, (3, 2), np.uint64).astype(unsigned)
  moved = []
  with jax.enable_x64(True):
    of = jax.jit(lambda x: privacy.digest({'w': x}))
    value = of(bits.view(jnp.dtype(dtype)))
    for place in np.ndindex(3, 2):
      for bit in range(8 * unsigned.itemsize):
        other = bits.copy()
        other[place] ^= unsigned.type(1) << unsigned.type(bit)
        moved.append(np.asarray(value ^ of(other.view(jnp.dtype(dtype)))))
  moved = np.array(moved, np.uint32)
  assert np.all(moved)
  # About half of the bits of each lane move, and not the same ones.
  assert np.all(abs(np.bitwise_count(moved).mean(0) - 16) < 2)
  assert len(np.unique(moved)) == moved.size


def test_places_and_leaves_count():
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  different = [
    {'a': x, 'b': 0 * x},
    {'a': 0 * x, 'b': x},
    {'a': x[::-1], 'b': 0 * x},
    {'a': x[:, ::-1], 'b': 0 * x},
    {'a': x[:, [1, 0, 2]], 'b': 0 * x},
    {'a': x, 'c': 0 * x},
    {'a': x},
  ]
  assert len({tuple(_of(tree)) for tree in different}) == len(different)
  assert tuple(_of({'a': x})) != tuple(_of({'a': x.T}))


def test_bits_count_and_not_values():
  zeros = np.array([0.0, -0.0], np.float32)
  nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
  of = jax.jit(privacy.digest)
  found = {digests.as_text(of(x)) for values in (zeros, nans) for x in values}
  assert len(found) == 5


def test_is_the_same_wherever_and_however_it_is_computed():
  tree = (np.ones((3, 2), np.float32), [np.zeros((0, 4), np.float32), np.float32(2)])
  expected = _of(tree)
  np.testing.assert_array_equal(jax.jit(privacy.digest)(tree), expected)
  with jax.enable_x64(True):
    lanes = jax.jit(privacy.digest)(tree)
  assert lanes.dtype == jnp.uint32
  np.testing.assert_array_equal(lanes, expected)
