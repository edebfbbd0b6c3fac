"""A digest of what a step released: equal if, and only if, the bits are.

128 bits, computed on the device inside the compiled step, for every parameter is looked at. It
is no cryptographic hash: it tells whether a step was repeated exactly, against accidents and not
against somebody who wants two sums to collide.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

LANES = 4


def digest(tree: PyTree) -> jax.Array:
  """uint32 (4,): a hash of the bits of all elements, their places and their leaves' names.

  Each element is mixed with its place, and the sum of all is taken modulo 2^32 in every lane.
  Integers add up to the same in any order: the digest is the same on any number of devices,
  however the leaves are cut. Bits count, not values: 0.0 and -0.0 differ, and so do two NaNs.

  Args:
    tree: of real arrays of any width; concrete or traced.
  """
  total = jnp.zeros(LANES, jnp.uint32)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path)
    salts = np.frombuffer(hashlib.sha256(name.encode()).digest()[: 4 * LANES], np.uint32)
    total += _leaf(leaf, salts)
  return total


def as_text(lanes: jax.Array) -> str:
  """The lanes of a digest as 32 hexadecimal digits."""
  return ''.join(f'{int(lane):08x}' for lane in np.asarray(lanes))


def _leaf(x: jax.Array, salts: np.ndarray) -> jax.Array:
  words = _words(x)
  # Of the whole leaf, not of its flat copy, which would have to be gathered from its shards.
  place, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    # A place past 2^32 has that of an earlier element; no leaf comes near.
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  # All lanes in one sum: one collective where the leaf is cut.
  salts = salts.reshape(-1, *[1] * words.ndim)
  return _mix(_mix(place + salts) ^ words).sum(range(1, words.ndim + 1), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
  """The bits of an array as uint32; wider elements become several, along a last axis."""
  width = jnp.dtype(x.dtype).itemsize
  if width > 4:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3 (Appleby): one to one, every bit moves about half of them."""
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))
