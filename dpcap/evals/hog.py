"""Histograms of oriented gradients (Dalal and Triggs 2005): features that nothing was trained for.

As scikit-image computes them with block_norm='L2-Hys' and channel_axis=-1: the colour with the
steepest gradient counts, every pixel votes for one of nine unsigned orientations in its cell, and
blocks of 2 x 2 cells are normalised. In JAX, for they are computed batch by batch beside others.
"""

import jax
import jax.numpy as jnp

_ORIENTATIONS = 9
_BLOCK = 2
_CLIPPED_AT = 0.2
_EPSILON = 1e-5


def hog(images: jax.Array, cell: int | None = None) -> jax.Array:
  """Features (B, D) of images (B, H, H, 3) of any range.

  Args:
    images: pixels; what is left over of whole cells at the right and bottom is not looked at.
    cell: side of a cell, pixels; None: a 14th of the image's, at least 4.
  """
  side = images.shape[1]
  cell = cell or max(4, side // 14)
  cells = side // cell
  # Differences of neighbours; none at the border.
  dy = jnp.pad(images[:, 2:] - images[:, :-2], ((0, 0), (1, 1), (0, 0), (0, 0)))
  dx = jnp.pad(images[:, :, 2:] - images[:, :, :-2], ((0, 0), (0, 0), (1, 1), (0, 0)))
  steepest = jnp.argmax(jnp.hypot(dx, dy), axis=-1, keepdims=True)
  dy, dx = (jnp.take_along_axis(d, steepest, axis=-1)[..., 0] for d in (dy, dx))
  angle = jnp.mod(jnp.degrees(jnp.arctan2(dy, dx)), 180.0)
  place = jnp.clip((angle * _ORIENTATIONS / 180).astype(int), 0, _ORIENTATIONS - 1)
  votes = jnp.hypot(dx, dy)[..., None] * jax.nn.one_hot(place, _ORIENTATIONS)
  votes = votes[:, : cells * cell, : cells * cell]
  shape = (len(images), cells, cell, cells, cell, _ORIENTATIONS)
  histograms_BxRxCxO = votes.reshape(shape).mean((2, 4))
  last = cells - _BLOCK + 1
  corners = [(r, c) for r in range(_BLOCK) for c in range(_BLOCK)]
  blocks = jnp.stack(
    [histograms_BxRxCxO[:, r : r + last, c : c + last] for r, c in corners], axis=3
  ).reshape(len(images), last, last, -1)
  normalised = jnp.minimum(_unit(blocks), _CLIPPED_AT)
  return _unit(normalised).reshape(len(images), -1)


def _unit(blocks):
  return blocks / jnp.sqrt(jnp.sum(blocks**2, axis=-1, keepdims=True) + _EPSILON**2)
