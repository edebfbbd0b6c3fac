"""The caption decoder: a post-norm transformer over text that attends to the image's memory.

Modules here take one example or any leading axes; shape suffixes leave those out.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.models.attention import attend
from dpcap.models.blocks import run_blocks
from dpcap.models.layer_norm import LayerNorm
from dpcap.models.positions import text_positions
from dpcap.models.vit import Dense, frozen, gelu


class BlockCache(NamedTuple):
  """What a block keeps while a caption grows.

  Attributes:
    keys_LxD, values_LxD: of self-attention, L tokens at most; written up to the position.
    memory_kv_Sx2D: keys and values of cross-attention.
  """

  keys_LxD: jax.Array
  values_LxD: jax.Array
  memory_kv_Sx2D: jax.Array | None


class Cache(NamedTuple):
  """What the decoder keeps while a caption grows.

  Attributes:
    position: int32 (), how many tokens it has seen.
    blocks: one BlockCache a block. Leading axes may be 1 where those of the tokens are not:
      so many texts go on from one prefix.
  """

  position: jax.Array
  blocks: tuple[BlockCache, ...]


class DecoderBlock(nn.Module):
  """x = LN(x + selfattention(x)); x = LN(x + crossattention(x, memory)); x = LN(x + mlp(x)).

  x is (..., T, width), memory (..., S, width). Self-attention is causal; no Dense has a bias.
  With a cache, x is what stands in the text from `position` on, and the cache is returned too,
  with x written to it; memory may then be None but in the first call.
  """

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_TxD: jax.Array,
    memory_SxD: jax.Array | None,
    cache: BlockCache | None = None,
    position: int | jax.Array = 0,
  ) -> jax.Array | tuple[jax.Array, BlockCache]:
    width = x_TxD.shape[-1]
    norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
    dense = functools.partial(Dense, use_bias=False, dtype=self.dtype)

    qkv_Tx3D = dense(3 * width, name='self_qkv')(x_TxD)
    q_TxD, k_LxD, v_LxD = jnp.split(qkv_Tx3D, 3, axis=-1)
    if cache is not None:
      k_LxD = _write(cache.keys_LxD, k_LxD, position)
      v_LxD = _write(cache.values_LxD, v_LxD, position)
    h_TxD = attend(q_TxD, k_LxD, v_LxD, heads=self.heads, causal=True, position=position)
    x_TxD = norm(name='self_norm')(x_TxD + dense(width, name='self_out')(h_TxD))

    q_TxD = dense(width, name='cross_q')(x_TxD)
    if memory_SxD is None:
      kv_Sx2D = cache.memory_kv_Sx2D
    else:
      kv_Sx2D = dense(2 * width, name='cross_kv')(memory_SxD)
    h_TxD = attend(q_TxD, *jnp.split(kv_Sx2D, 2, axis=-1), heads=self.heads, causal=False)
    x_TxD = norm(name='cross_norm')(x_TxD + dense(width, name='cross_out')(h_TxD))

    h_Tx4D = gelu(dense(4 * width, name='mlp_in')(x_TxD))
    x_TxD = norm(name='mlp_norm')(x_TxD + dense(width, name='mlp_out')(h_Tx4D))
    return x_TxD if cache is None else (x_TxD, BlockCache(k_LxD, v_LxD, kv_Sx2D))


class CaptionDecoder(nn.Module):
  """Next-token logits: memory (..., S, width), tokens (..., T) int -> (..., T, vocab_size).

  Logits at position t depend on tokens 0..t only. Works for any T: positions are computed.
  With a cache, the tokens follow those that it has seen, and the result is (logits, cache);
  blocks must then be unrolled. The text type embedding is frozen. `scan_blocks` and `remat`: see
  `run_blocks`. Source: Sander et al. 2024, section 3, and its code.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  dtype: jnp.dtype
  scan_blocks: bool = False
  remat: bool = False

  @nn.compact
  def __call__(
    self, memory_SxD: jax.Array | None, tokens_T: jax.Array, cache: Cache | None = None
  ) -> jax.Array | tuple[jax.Array, Cache]:
    embed = nn.Embed(
      self.vocab_size,
      self.width,
      dtype=self.dtype,
      name='token_embedding',
      embedding_init=nn.initializers.normal(1.0),
    )
    type_embedding_D = frozen(self, 'type_embedding', self.width)
    if cache is None:
      positions_TxD = text_positions(tokens_T.shape[-1], self.width)
    else:
      position = cache.position
      longest = cache.blocks[0].keys_LxD.shape[-2]
      positions_TxD = jax.lax.dynamic_slice_in_dim(
        jnp.asarray(text_positions(longest, self.width)), position, tokens_T.shape[-1]
      )

    x_TxD = embed(tokens_T)
    x_TxD += jnp.asarray(positions_TxD, x_TxD.dtype) + type_embedding_D.astype(x_TxD.dtype)
    settings = dict(heads=self.heads, dtype=self.dtype)
    if cache is None:
      how = dict(scan=self.scan_blocks, remat=self.remat)
      x_TxD = run_blocks(DecoderBlock, self.depth, x_TxD, memory_SxD, **how, **settings)
    else:
      kept = []
      for i, block in enumerate(cache.blocks):
        run = DecoderBlock(**settings, name=f'block_{i}')
        x_TxD, block = run(x_TxD, memory_SxD, block, position)
        kept.append(block)
    x_TxD = LayerNorm(epsilon=1e-5, dtype=self.dtype, name='norm')(x_TxD)
    logits_TxV = Dense(self.vocab_size, dtype=self.dtype, name='logits')(x_TxD)
    if cache is None:
      return logits_TxV
    return logits_TxV, Cache(position + tokens_T.shape[-1], tuple(kept))

  @nn.nowrap
  def empty_cache(self, leading: tuple[int, ...], length: int) -> Cache:
    """A cache for texts of up to `length` tokens, before the first one."""
    zeros = jnp.zeros((*leading, length, self.width), self.dtype)
    return Cache(jnp.int32(0), (BlockCache(zeros, zeros, None),) * self.depth)


def _write(kept_LxD: jax.Array, new_TxD: jax.Array, position: jax.Array) -> jax.Array:
  """`kept_LxD` with `new_TxD` from `position` on, for each of the new one's leading axes."""
  kept_LxD = jnp.broadcast_to(kept_LxD, (*new_TxD.shape[:-2], *kept_LxD.shape[-2:]))
  return jax.lax.dynamic_update_slice_in_dim(kept_LxD, new_TxD, position, axis=-2)
