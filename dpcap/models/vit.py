"""The image encoder: a pre-norm vision transformer.

Modules here take one example or any leading axes; shape suffixes leave those out.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpcap.models.attention import attend
from dpcap.models.blocks import run_blocks
from dpcap.models.layer_norm import LayerNorm
from dpcap.models.positions import image_positions
from dpcap.models.precision import at_least_float32
from dpcap.models.stem import ConvolutionalStem

STEMS = ('linear', 'convolutional')

# The kernels of projections are Xavier uniform, also the fused ones (as one matrix).
Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x) by the error function, as the reference implementation computes it.

  `flax.linen.gelu` takes erfc, which is finer in the far tail and costs more than twice.
  """
  return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def patch_grid(image_shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
  """Rows and columns of patches in an image of shape (..., H, W, 3).

  Raises:
    ValueError: if H or W is not a multiple of `patch_size`.
  """
  height, width = image_shape[-3:-1]
  if height % patch_size or width % patch_size:
    raise ValueError(f'image {height}x{width} is not a whole number of {patch_size} px patches')
  return height // patch_size, width // patch_size


def patchify(image_HxWx3: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images (..., H, W, 3) into flat patches (..., P, patch_size^2 * 3), row by row.

  Within a patch the order is row, column, channel.
  """
  rows, columns = patch_grid(image_HxWx3.shape, patch_size)
  leading = image_HxWx3.shape[:-3]
  x = image_HxWx3.reshape(*leading, rows, patch_size, columns, patch_size, 3)
  x = jnp.swapaxes(x, -4, -3)
  return x.reshape(*leading, rows * columns, patch_size * patch_size * 3)


def grid_means(tokens_TxD: jax.Array, grid: tuple[int, int], most: int = 4) -> jax.Array:
  """Means of an encoder's tokens (..., 1+P, D) over fields of the image, side by side.

  Unlike the mean over all, they tell where something is.

  Args:
    tokens_TxD: the class token first, which takes no part, then the patches row by row.
    grid: rows and columns of patches.
    most: the image is cut into most x most fields, or one a patch if there are fewer. A patch that
      lies in two fields counts for both, by its share.

  Returns:
    (..., fields * D), at least float32.
  """
  x_RxCxD = at_least_float32(tokens_TxD[..., 1:, :]).reshape(*tokens_TxD.shape[:-2], *grid, -1)
  rows, columns = (jnp.asarray(_fields(n, min(n, most)), x_RxCxD.dtype) for n in grid)
  means = jnp.einsum('ir,jc,...rcd->...ijd', rows, columns, x_RxCxD)
  return means.reshape(*means.shape[:-3], -1)


def _fields(patches: int, fields: int) -> np.ndarray:
  """Weights (fields, patches): which share of each field every patch covers."""
  edges = np.linspace(0, patches, fields + 1)
  patch = np.arange(patches)
  covered = np.minimum(edges[1:, None], patch + 1) - np.maximum(edges[:-1, None], patch)
  return np.maximum(covered, 0) * fields / patches


class EncoderBlock(nn.Module):
  """x = x + attention(LN(x)); x = x + mlp(LN(x)), for x (..., T, width)."""

  heads: int
  dtype: jnp.dtype
  qkv_bias: bool = False

  @nn.compact
  def __call__(self, x_TxD: jax.Array) -> jax.Array:
    width = x_TxD.shape[-1]
    norm = functools.partial(LayerNorm, epsilon=1e-6, dtype=self.dtype)
    dense = functools.partial(Dense, dtype=self.dtype)

    h_TxD = norm(name='attention_norm')(x_TxD)
    qkv_Tx3D = dense(3 * width, use_bias=self.qkv_bias, name='attention_qkv')(h_TxD)
    h_TxD = attend(*jnp.split(qkv_Tx3D, 3, axis=-1), heads=self.heads, causal=False)
    x_TxD += dense(width, name='attention_out')(h_TxD)

    h_TxD = norm(name='mlp_norm')(x_TxD)
    h_Tx4D = gelu(dense(4 * width, name='mlp_in')(h_TxD))
    return x_TxD + dense(width, name='mlp_out')(h_Tx4D)


def encode(
  x_TxD: jax.Array, depth: int, *, dtype: jnp.dtype, block_means: bool = False, **how
) -> jax.Array:
  """Tokens (..., T, width) through the encoder's blocks and its norm; call it in a compact method.

  Args:
    x_TxD: the first token is the class token.
    depth: how many blocks.
    dtype: compute type.
    block_means: give instead what ViP's linear probe takes: of each block's output the mean over
      all tokens but the first, side by side, (..., depth * width), at least float32.
    how: attributes of `EncoderBlock`, options of `run_blocks`.
  """
  if not block_means:
    x_TxD = run_blocks(EncoderBlock, depth, x_TxD, dtype=dtype, **how)
    return LayerNorm(epsilon=1e-6, dtype=dtype, name='norm')(x_TxD)
  mean = lambda x_TxD: jnp.mean(at_least_float32(x_TxD[..., 1:, :]), axis=-2)
  means_NxD = run_blocks(EncoderBlock, depth, x_TxD, dtype=dtype, observe=mean, **how)
  return jnp.concatenate(list(means_NxD), axis=-1)


class ViT(nn.Module):
  """Vision transformer: images (..., H, W, 3) -> tokens (..., 1+P, width), class token first.

  The class token and the type embedding are frozen (collection 'frozen'): they are added
  but never trained, as in the reference implementation. `stem` is one of STEMS: what makes tokens of
  patches. `scan_blocks` and `remat`: see `run_blocks`; `block_means`: see `encode`.
  Source: Dosovitskiy et al. 2021; MAE (He et al. 2022) for the positions.
  """

  patch_size: int
  width: int
  depth: int
  heads: int
  dtype: jnp.dtype
  stem: str = 'linear'
  scan_blocks: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, image_HxWx3: jax.Array, block_means: bool = False) -> jax.Array:
    positions_TxD = image_positions(*patch_grid(image_HxWx3.shape, self.patch_size), self.width)
    class_token_D = frozen(self, 'class_token', self.width)
    type_embedding_D = frozen(self, 'type_embedding', self.width)

    if self.stem == 'convolutional':
      x_PxD = ConvolutionalStem(self.patch_size, self.width, self.dtype, name='stem')(image_HxWx3)
    else:
      patches_PxK = patchify(image_HxWx3, self.patch_size)
      x_PxD = Dense(self.width, dtype=self.dtype, name='patch_projection')(patches_PxK)
    class_1xD = jnp.broadcast_to(
      class_token_D.astype(x_PxD.dtype), (*x_PxD.shape[:-2], 1, self.width)
    )
    x_TxD = jnp.concatenate([class_1xD, x_PxD], axis=-2)
    x_TxD += jnp.asarray(positions_TxD, x_TxD.dtype) + type_embedding_D.astype(x_TxD.dtype)

    return encode(
      x_TxD,
      self.depth,
      dtype=self.dtype,
      block_means=block_means,
      heads=self.heads,
      scan=self.scan_blocks,
      remat=self.remat,
    )


def frozen(module: nn.Module, name: str, width: int) -> jax.Array:
  """The module's untrained vector (width,): drawn normal(0.02) by `init`, then constant."""
  init = lambda: nn.initializers.normal(0.02)(module.make_rng('params'), (width,))
  return module.variable('frozen', name, init).value
