"""Fixed sin-cos position embeddings: computed constants, neither trained nor stored."""

import numpy as np


def sincos(positions: np.ndarray, width: int) -> np.ndarray:
  """Embeds positions (N,) as (N, width) float64: [sin | cos] of pos / 10000^(2i/width).

  `width` must be even. Source: Vaswani et al. 2017, section 3.5, with all sines first.
  """
  frequencies = 10_000.0 ** (-2 * np.arange(width // 2) / width)
  angles = positions[:, None].astype(np.float64) * frequencies
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def text_positions(length: int, width: int) -> np.ndarray:
  """Position embeddings (length, width) of a caption's tokens, float64."""
  return sincos(np.arange(length), width)


def image_positions(rows: int, columns: int, width: int) -> np.ndarray:
  """Position embeddings (1 + rows*columns, width) of an image's tokens, float64.

  Row 0 is the class token's and is zero; patches follow row by row. The first half of the
  channels encodes the patch's column, the second half its row ("w goes first" in MAE's
  code, which official weights rely on). `width` must be a multiple of four.
  """
  row, column = np.divmod(np.arange(rows * columns), columns)
  patches = np.concatenate([sincos(column, width // 2), sincos(row, width // 2)], axis=1)
  return np.concatenate([np.zeros((1, width)), patches])
