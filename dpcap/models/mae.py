"""The masked autoencoder that ViP trains: it sees a quarter of an image and paints the rest.

Nothing here mixes examples. Modules take one example or any leading axes; shape suffixes leave
those out.
"""

from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpcap.errors import UserError
from dpcap.key import POSITIVE, Key
from dpcap.models import keys
from dpcap.models.positions import image_positions
from dpcap.models.precision import at_least_float32
from dpcap.models.vit import Dense, encode, frozen, grid_means, patch_grid, patchify

# ViP's encoders have so many heads where the captioner's of that width have 6.
_HEADS = {'nano': 12, 'tiny': 12}

_ENCODERS = ('vip', 'captioner')

_small_normal = nn.initializers.normal(0.02)


class MAE(nn.Module):
  """Masked autoencoder (He et al. 2022), as ViP has it (Yu et al. 2024).

  Use: `variables = model.init(jax.random.key(0), image, key)`; all of them are trained
  (`variables['params']`, float32). Every method takes one example or any leading axes `...`,
  the same for all arguments. Images are (..., H, W, 3), normalised floats.

  Which patches are removed is told by uniform numbers, one a patch ("mask noise"): in their
  ascending order the first (1 - mask_ratio) P patches, rounded down, are kept.

  Attributes:
    patch_size: side of a square patch, pixels.
    width, depth, heads: of the encoder; width a multiple of four and of heads.
    decoder_width, decoder_depth, decoder_heads: of the decoder, likewise.
    encoder_of: 'vip', or 'captioner', whose encoder it then is to the last parameter: no bias of
      queries, keys and values; the class token is a constant, and so is a type embedding.
    mask_ratio: share of the patches that the encoder does not see and the loss is taken on.
    train_positions: whether position embeddings are parameters that start as the sin-cos
      constants, as in ViP's code, rather than these constants. Images then have one size.
    dtype: compute type. Norms, softmax, features and loss use at least float32.
    scan_blocks: compile one block of the encoder and one of the decoder, their parameters stacked.
    remat: compute the inside of every block again in the backward pass.
  """

  INPUTS = ('image', 'key')
  LOSS_UNIT = 'squared error of a pixel'
  KEYS = keys.TRANSFORMER | {
    'encoder_of': Key(
      str,
      'vip',
      "whose encoder it has: ViP's or the captioner's, which can then start from it (train.init)",
      _ENCODERS,
    ),
    'mask_ratio': Key(
      float,
      0.75,
      'share of the patches that are removed, and painted',
      check=(lambda x: 0 < x < 1, 'above 0, below 1'),
    ),
    'decoder_width': Key(int, 512, 'of its tokens', check=POSITIVE),
    'decoder_depth': Key(int, 4, 'blocks', check=POSITIVE),
    'decoder_heads': Key(int, 16, 'of attention', check=POSITIVE),
    'train_positions': Key(
      bool, False, "train the position embeddings, as ViP's code does; False: they are constants"
    ),
  }
  # What `features` can be of; the first is the default.
  LAYERS = ('encoder', 'all_blocks', 'grid')
  # The top-level parameters that features depend on.
  FEATURE_PARTS = ('encoder',)

  patch_size: int
  width: int
  depth: int
  heads: int
  decoder_width: int
  decoder_depth: int
  decoder_heads: int
  encoder_of: str = 'vip'
  mask_ratio: float = 0.75
  train_positions: bool = False
  dtype: jnp.dtype = jnp.float32
  scan_blocks: bool = False
  remat: bool = False

  @classmethod
  def make(
    cls,
    *,
    image_size: int,
    vocab_size: int,
    remat: bool,
    size: str,
    patch_size: int | None,
    dtype: str,
    scan_blocks: bool,
    encoder_of: str,
    mask_ratio: float,
    decoder_width: int,
    decoder_depth: int,
    decoder_heads: int,
    train_positions: bool,
  ) -> Self:
    """A masked autoencoder whose encoder has a named size; see `dpcap.models.make_model`."""
    del vocab_size
    shape = keys.shape_of(size, patch_size, image_size)
    if keys.one_of('encoder_of', encoder_of, _ENCODERS) == 'vip':
      shape = shape._replace(heads=_HEADS.get(size, shape.heads))
    elif train_positions:
      raise UserError("train_positions=True goes with encoder_of='vip' only")
    if decoder_width % 4 or decoder_width % decoder_heads:
      raise UserError(
        f'decoder_width={decoder_width} must be a multiple of 4 and of'
        f' decoder_heads={decoder_heads}'
      )
    patches = (image_size // shape.patch_size) ** 2
    if not 0 < _number_kept(patches, mask_ratio) < patches:
      raise UserError(
        f'mask_ratio={mask_ratio} keeps {_number_kept(patches, mask_ratio)} of {patches} patches;'
        ' at least one must be kept and one removed'
      )
    return cls(
      shape.patch_size,
      shape.width,
      shape.depth,
      shape.heads,
      decoder_width,
      decoder_depth,
      decoder_heads,
      encoder_of,
      mask_ratio,
      train_positions,
      keys.DTYPES[keys.one_of('dtype', dtype, keys.DTYPES)],
      scan_blocks,
      remat,
    )

  @nn.nowrap
  def about(self) -> str:
    """What it is, in words."""
    return (
      f'masked autoencoder (a ViT encoder of {self.depth} layers and width {self.width}, a decoder'
      f' of {self.decoder_depth} layers and width {self.decoder_width}; {self.mask_ratio:.0%} of'
      ' the patches removed)'
    )

  def setup(self):
    blocks = dict(
      train_positions=self.train_positions,
      dtype=self.dtype,
      scan_blocks=self.scan_blocks,
      remat=self.remat,
    )
    self.encoder = MaskedEncoder(
      self.patch_size,
      self.width,
      self.depth,
      self.heads,
      of_captioner=self.encoder_of == 'captioner',
      **blocks,
    )
    self.decoder = PixelDecoder(
      self.patch_size, self.decoder_width, self.decoder_depth, self.decoder_heads, **blocks
    )

  def __call__(self, image_HxWx3: jax.Array, key: jax.Array) -> jax.Array:
    """The loss (...) of painting what a mask of the example's own removes.

    Args:
      image_HxWx3: (..., H, W, 3).
      key: uint32 (..., 2), random bits; equal ones give equal masks.
    """
    rows, columns = patch_grid(image_HxWx3.shape, self.patch_size)
    return self.loss(image_HxWx3, mask_noise(key, rows * columns))

  def loss(self, image_HxWx3: jax.Array, noise_P: jax.Array) -> jax.Array:
    """Mean squared error (...) over the pixels of the patches that mask noise (..., P) removes."""
    pixels_PxK, removed_P = self.paint(image_HxWx3, noise_P)
    target_PxK = patchify(image_HxWx3, self.patch_size)
    errors_P = jnp.mean(jnp.square(at_least_float32(pixels_PxK) - target_PxK), axis=-1)
    return jnp.mean(errors_P, axis=-1, where=removed_P)

  def paint(self, image_HxWx3: jax.Array, noise_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The decoder's pixels for all patches (..., P, patch_size^2 * 3), laid out as `patchify` does,
    and which of these mask noise (..., P) removes (..., P)."""
    kept_N, place_P = self.shuffle(noise_P)
    tokens_TxD = self.encoder(image_HxWx3, kept_N)
    grid = patch_grid(image_HxWx3.shape, self.patch_size)
    return self.decoder(tokens_TxD, place_P, grid), place_P >= kept_N.shape[-1]

  def encode(self, image_HxWx3: jax.Array, noise_P: jax.Array | None = None) -> jax.Array:
    """Encoder output (..., 1+N, width), after its last LayerNorm; class token first.

    Then come the patches that mask noise keeps, in its order; without it, all of them, row by row.
    """
    return self.encoder(image_HxWx3, None if noise_P is None else self.shuffle(noise_P)[0])

  @nn.nowrap
  def shuffle(self, noise_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What mask noise (..., P) says.

    Returns:
      The kept patches (..., N), in ascending order of their noise; and of every patch its place
      in that order (..., P): those from N on are removed.
    """
    order_P = jnp.argsort(noise_P, axis=-1)
    kept = _number_kept(noise_P.shape[-1], self.mask_ratio)
    return order_P[..., :kept], jnp.argsort(order_P, axis=-1)

  def features(self, image_HxWx3: jax.Array, layers: str = LAYERS[0]) -> jax.Array:
    """Image features for probing, (..., D), at least float32; nothing is masked.

    Args:
      image_HxWx3: (..., H, W, 3).
      layers: the mean over the patches of the 'encoder', after its last LayerNorm; or
        'all_blocks': that after every block, side by side, as ViP probes; or 'grid': the first over
        4 x 4 fields, see `grid_means`. The class token takes no part.
    """
    if layers == 'all_blocks':
      return self.encoder(image_HxWx3, block_means=True)
    if layers == 'grid':
      return grid_means(self.encode(image_HxWx3), patch_grid(image_HxWx3.shape, self.patch_size))
    tokens = {'encoder': self.encode}[layers]
    return jnp.mean(at_least_float32(tokens(image_HxWx3)[..., 1:, :]), axis=-2)


class MaskedEncoder(nn.Module):
  """Images (..., H, W, 3) -> tokens (..., 1+N, width) of the N patches that are kept.

  The class token stands first. `of_captioner`: see `MAE.encoder_of`; see there for the others, and
  `vit.encode` for `block_means`.
  """

  patch_size: int
  width: int
  depth: int
  heads: int
  of_captioner: bool
  train_positions: bool
  dtype: jnp.dtype
  scan_blocks: bool
  remat: bool

  @nn.compact
  def __call__(
    self,
    image_HxWx3: jax.Array,
    kept_N: jax.Array | None = None,
    block_means: bool = False,
  ) -> jax.Array:
    if self.of_captioner:
      class_token_D = frozen(self, 'class_token', self.width)
    else:
      class_token_D = self.param('class_token', _small_normal, (self.width,))
    positions_TxD = _positions(self, patch_grid(image_HxWx3.shape, self.patch_size))
    patches_NxK = patchify(image_HxWx3, self.patch_size)
    if kept_N is not None:
      # Before anything is computed of the others. The positions are looked up as embeddings
      # are, all at once: clipping knows the gradient of that without holding it.
      patches_NxK = jnp.take_along_axis(patches_NxK, kept_N[..., None], axis=-2)
      kept_T = jnp.concatenate([jnp.zeros_like(kept_N[..., :1]), 1 + kept_N], axis=-1)
      positions_TxD = jnp.take(positions_TxD, kept_T, axis=0, mode='clip')

    x_NxD = Dense(self.width, dtype=self.dtype, name='patch_projection')(patches_NxK)
    class_1xD = jnp.broadcast_to(
      class_token_D.astype(x_NxD.dtype), (*x_NxD.shape[:-2], 1, self.width)
    )
    x_TxD = jnp.concatenate([class_1xD, x_NxD], axis=-2)
    x_TxD += positions_TxD.astype(x_TxD.dtype)
    if self.of_captioner:
      x_TxD += frozen(self, 'type_embedding', self.width).astype(x_TxD.dtype)
    return _encode(self, x_TxD, block_means, qkv_bias=not self.of_captioner)


class PixelDecoder(nn.Module):
  """Tokens (..., 1+N, D) of the kept patches -> pixels (..., P, patch_size^2 * 3) of all.

  `place_P` (..., P) is where a patch stands among the tokens; where it is N or more, a trained mask
  token stands for the patch. `grid` is the rows and columns of patches. See `MAE` for the
  attributes.
  """

  patch_size: int
  width: int
  depth: int
  heads: int
  train_positions: bool
  dtype: jnp.dtype
  scan_blocks: bool
  remat: bool

  @nn.compact
  def __call__(
    self, tokens_TxE: jax.Array, place_P: jax.Array, grid: tuple[int, int]
  ) -> jax.Array:
    mask_token_D = self.param('mask_token', _small_normal, (self.width,))
    x_TxD = Dense(self.width, dtype=self.dtype, name='embedding')(tokens_TxE)
    class_1xD, kept_NxD = x_TxD[..., :1, :], x_TxD[..., 1:, :]
    place_Px1 = place_P[..., None]
    x_PxD = jnp.where(
      place_Px1 < kept_NxD.shape[-2],
      jnp.take_along_axis(kept_NxD, place_Px1, axis=-2, mode='fill', fill_value=0),
      mask_token_D.astype(x_TxD.dtype),
    )
    x_TxD = jnp.concatenate([class_1xD, x_PxD], axis=-2)
    x_TxD += _positions(self, grid).astype(x_TxD.dtype)
    x_TxD = _encode(self, x_TxD)
    pixels = self.patch_size**2 * 3
    return Dense(pixels, dtype=self.dtype, name='pixels')(x_TxD[..., 1:, :])


def mask_noise(key: jax.Array, patches: int) -> jax.Array:
  """Uniform numbers (..., patches) from random bits uint32 (..., 2)."""

  def of_one(key):
    return jax.random.uniform(jax.random.wrap_key_data(key, impl='threefry2x32'), (patches,))

  return jnp.vectorize(of_one, signature='(k)->(p)')(key)


def _number_kept(patches: int, mask_ratio: float) -> int:
  return int(patches * (1 - mask_ratio))


def _encode(
  module: MaskedEncoder | PixelDecoder, x_TxD: jax.Array, block_means=False, qkv_bias=True
) -> jax.Array:
  """`vit.encode` with the module's attributes."""
  return encode(
    x_TxD,
    module.depth,
    dtype=module.dtype,
    block_means=block_means,
    heads=module.heads,
    qkv_bias=qkv_bias,
    scan=module.scan_blocks,
    remat=module.remat,
  )


def _positions(
  module: MaskedEncoder | PixelDecoder, grid: tuple[int, int]
) -> np.ndarray | jax.Array:
  """Position embeddings (1+P, width), as constants or as the module's parameter."""
  computed_TxD = image_positions(*grid, module.width)
  if not module.train_positions:
    return computed_TxD
  return module.param('positions', lambda _: jnp.asarray(computed_TxD, jnp.float32))
