"""The captioner that DP-Cap trains: image -> memory -> loss of its caption.

Nothing here mixes examples. Training maps `loss` over examples; evaluations call the same
methods with leading batch axes, which give the same numbers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.errors import UserError
from dpcap.key import Key
from dpcap.models import keys
from dpcap.models.decoder import Cache, CaptionDecoder
from dpcap.models.positions import image_positions
from dpcap.models.precision import at_least_float32
from dpcap.models.stem import fits
from dpcap.models.vit import STEMS, Dense, ViT, frozen, grid_means, patch_grid

PADDING = 0  # the token id that carries no loss


class Captioner(nn.Module):
  """ViT encoder and autoregressive text decoder (Sander et al. 2024).

  Use: `variables = model.init(key, image, tokens)`, then
  `model.apply(variables, image, method='features')` and so on. `variables['params']` is what
  is trained (float32), `variables['frozen']` what is not (class token, type embeddings).
  Every method takes one example or any leading axes `...`, the same for all arguments.
  Images are (..., H, W, 3), normalised floats; H and W multiples of `patch_size`.

  Attributes:
    vocab_size: number of token ids; id 0 is padding.
    patch_size: side of a square patch, pixels.
    width, depth, heads: of the encoder; width a multiple of four and of heads.
    decoder_width, decoder_depth, decoder_heads: of the decoder, likewise.
    stem: see `ViT`.
    dtype: compute type. Norms, softmax, features and loss use at least float32.
    scan_blocks: compile one block of the encoder and one of the decoder, their parameters stacked.
    remat: compute the inside of every block again in the backward pass.
  """

  INPUTS = ('image', 'tokens')
  LOSS_UNIT = 'nats per token'
  KEYS = keys.TRANSFORMER | {
    'stem': Key(
      str,
      'linear',
      'what makes tokens of patches: a linear map of their pixels, or convolutions',
      STEMS,
    ),
  }
  # What `features` can be of; the first is the default.
  LAYERS = ('memory', 'encoder', 'projection', 'all_blocks', 'grid')
  # The top-level parameters that features depend on.
  FEATURE_PARTS = ('encoder', 'memory_projection')

  vocab_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  decoder_width: int
  decoder_depth: int
  decoder_heads: int
  stem: str = 'linear'
  dtype: jnp.dtype = jnp.float32
  scan_blocks: bool = False
  remat: bool = False

  @classmethod
  def make(cls, *, image_size, vocab_size, remat, size, patch_size, dtype, scan_blocks, stem):
    """A captioner of a named size; see `dpcap.models.make_model`."""
    shape = keys.shape_of(size, patch_size, image_size)
    if keys.one_of('stem', stem, STEMS) == 'convolutional' and not fits(
      shape.patch_size, shape.width
    ):
      raise UserError(
        f'patch_size={shape.patch_size} must be a power of 2, from 2 to twice the width,'
        f" {shape.width}, with stem='convolutional'"
      )
    return cls(
      vocab_size=vocab_size,
      stem=stem,
      dtype=keys.DTYPES[keys.one_of('dtype', dtype, keys.DTYPES)],
      scan_blocks=scan_blocks,
      remat=remat,
      **shape._asdict(),
    )

  @nn.nowrap
  def about(self) -> str:
    """What it is, in words."""
    stem = ' behind convolutions' if self.stem == 'convolutional' else ''
    return (
      f'image captioner (a ViT encoder of {self.depth} layers and width {self.width}{stem}, a text'
      f' decoder of {self.decoder_depth} layers and width {self.decoder_width})'
    )

  def setup(self):
    blocks = dict(scan_blocks=self.scan_blocks, remat=self.remat)
    shape = self.patch_size, self.width, self.depth, self.heads, self.dtype
    self.encoder = ViT(*shape, self.stem, **blocks)
    self.memory_projection = Dense(self.decoder_width, dtype=self.dtype)
    self.memory_type_embedding = frozen(self, 'memory_type_embedding', self.decoder_width)
    self.decoder = CaptionDecoder(
      self.vocab_size,
      self.decoder_width,
      self.decoder_depth,
      self.decoder_heads,
      self.dtype,
      **blocks,
    )

  def encode(self, image_HxWx3: jax.Array) -> jax.Array:
    """Encoder output (..., 1+P, width), after its last LayerNorm; class token first."""
    return self.encoder(image_HxWx3)

  def project(self, image_HxWx3: jax.Array) -> jax.Array:
    """Encoder output at the decoder's width, (..., 1+P, decoder_width)."""
    return self.memory_projection(self.encode(image_HxWx3))

  def memory(self, image_HxWx3: jax.Array) -> jax.Array:
    """What the decoder attends to, (..., 1+P, decoder_width)."""
    memory_SxD = self.project(image_HxWx3)
    positions_SxD = image_positions(
      *patch_grid(image_HxWx3.shape, self.patch_size), self.decoder_width
    )
    return (
      memory_SxD
      + jnp.asarray(positions_SxD, memory_SxD.dtype)
      + self.memory_type_embedding.astype(memory_SxD.dtype)
    )

  def features(self, image_HxWx3: jax.Array, layers: str = LAYERS[0]) -> jax.Array:
    """Image features for probing, (..., D), at least float32.

    Args:
      image_HxWx3: (..., H, W, 3).
      layers: the mean over the tokens of the 'memory', which is the paper's; of the 'encoder',
        after its last LayerNorm; of their 'projection', before positions and type embedding are
        added. Or 'all_blocks': that over the patches after every block, side by side, as ViP
        probes. Or 'grid': those of the encoder's patches over 4 x 4 fields, see `grid_means`.
    """
    if layers == 'all_blocks':
      return self.encoder(image_HxWx3, block_means=True)
    if layers == 'grid':
      return grid_means(self.encode(image_HxWx3), patch_grid(image_HxWx3.shape, self.patch_size))
    tokens = {'memory': self.memory, 'encoder': self.encode, 'projection': self.project}[layers]
    return jnp.mean(at_least_float32(tokens(image_HxWx3)), axis=-2)

  def decode(self, memory_SxD: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """Logits (..., T, vocab_size) of the token after each of `tokens_T` (..., T)."""
    return self.decoder(memory_SxD, tokens_T)

  def start(
    self, memory_SxD: jax.Array, tokens_T: jax.Array, length: int
  ) -> tuple[jax.Array, Cache]:
    """As `decode`, and the cache from which texts of up to `length` tokens go on."""
    return self.decoder(memory_SxD, tokens_T, self.decoder.empty_cache(tokens_T.shape[:-1], length))

  def extend(self, cache: Cache, tokens_T: jax.Array) -> tuple[jax.Array, Cache]:
    """Logits (..., T, vocab_size) after each token that follows what `cache` has seen.

    Leading axes of the cache may be 1: then texts share what stands before. More tokens than
    the cache has room for give wrong logits without an error.
    """
    return self.decoder(None, tokens_T, cache)

  def loss(self, image_HxWx3: jax.Array, tokens_L: jax.Array) -> jax.Array:
    """Mean cross-entropy (...) over the caption's non-padding targets.

    `tokens_L` (..., L) is [CLS] caption [SEP] [PAD]...; the targets are tokens 1..L-1. A
    caption without a target has loss 0 and zero gradient: DP-SGD counts such an example as
    drawn, so it must contribute nothing rather than NaN.
    """
    return self.text_loss(self.memory(image_HxWx3), tokens_L)

  def text_loss(self, memory_SxD: jax.Array, tokens_L: jax.Array) -> jax.Array:
    """The `loss` of captions of an image whose memory is known; its leading axes may be 1."""
    inputs_T, targets_T = tokens_L[..., :-1], tokens_L[..., 1:]
    logits_TxV = at_least_float32(self.decode(memory_SxD, inputs_T))
    target_logits_T = jnp.take_along_axis(logits_TxV, targets_T[..., None], axis=-1)[..., 0]
    losses_T = jax.nn.logsumexp(logits_TxV, axis=-1) - target_logits_T
    counted_T = targets_T != PADDING
    count = jnp.maximum(jnp.sum(counted_T, axis=-1), 1)
    return jnp.sum(losses_T, axis=-1, where=counted_T) / count

  __call__ = loss
