"""The caption decoder: a post-norm transformer over text that attends to the image's memory.

Modules here take one example or any leading axes; shape suffixes leave those out.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.models.attention import attend
from dpcap.models.blocks import run_blocks
from dpcap.models.positions import text_positions
from dpcap.models.vit import Dense, frozen, gelu


class DecoderBlock(nn.Module):
  """x = LN(x + selfattention(x)); x = LN(x + crossattention(x, memory)); x = LN(x + mlp(x)).

  x is (..., T, width), memory (..., S, width). Self-attention is causal; no Dense has a bias.
  """

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_TxD: jax.Array, memory_SxD: jax.Array) -> jax.Array:
    width = x_TxD.shape[-1]
    norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
    dense = functools.partial(Dense, use_bias=False, dtype=self.dtype)

    qkv_Tx3D = dense(3 * width, name='self_qkv')(x_TxD)
    h_TxD = attend(*jnp.split(qkv_Tx3D, 3, axis=-1), heads=self.heads, causal=True)
    x_TxD = norm(name='self_norm')(x_TxD + dense(width, name='self_out')(h_TxD))

    q_TxD = dense(width, name='cross_q')(x_TxD)
    kv_Sx2D = dense(2 * width, name='cross_kv')(memory_SxD)
    h_TxD = attend(q_TxD, *jnp.split(kv_Sx2D, 2, axis=-1), heads=self.heads, causal=False)
    x_TxD = norm(name='cross_norm')(x_TxD + dense(width, name='cross_out')(h_TxD))

    h_Tx4D = gelu(dense(4 * width, name='mlp_in')(x_TxD))
    return norm(name='mlp_norm')(x_TxD + dense(width, name='mlp_out')(h_Tx4D))


class CaptionDecoder(nn.Module):
  """Next-token logits: memory (..., S, width), tokens (..., T) int -> (..., T, vocab_size).

  Logits at position t depend on tokens 0..t only. Works for any T: positions are computed.
  The text type embedding is frozen. `scan_blocks` and `remat`: see `run_blocks`. Source: Sander et al. 2024, section 3, and its code.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  dtype: jnp.dtype
  scan_blocks: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, memory_SxD: jax.Array, tokens_T: jax.Array) -> jax.Array:
    embed = nn.Embed(
      self.vocab_size,
      self.width,
      dtype=self.dtype,
      name='token_embedding',
      embedding_init=nn.initializers.normal(1.0),
    )
    type_embedding_D = frozen(self, 'type_embedding', self.width)
    positions_TxD = text_positions(tokens_T.shape[-1], self.width)

    x_TxD = embed(tokens_T)
    x_TxD += jnp.asarray(positions_TxD, x_TxD.dtype) + type_embedding_D.astype(x_TxD.dtype)
    x_TxD = run_blocks(
      DecoderBlock,
      self.depth,
      x_TxD,
      memory_SxD,
      scan=self.scan_blocks,
      remat=self.remat,
      heads=self.heads,
      dtype=self.dtype,
    )
    x_TxD = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name='norm')(x_TxD)
    return Dense(self.vocab_size, dtype=self.dtype, name='logits')(x_TxD)
