"""Scaled dot-product attention, shared by the encoder and the decoder."""

import jax
import jax.numpy as jnp


def attend(
  q_TxD: jax.Array,
  k_SxD: jax.Array,
  v_SxD: jax.Array,
  *,
  heads: int,
  causal: bool,
  position: int | jax.Array = 0,
) -> jax.Array:
  """Multi-head attention of T queries over S keys and values; returns (..., T, D).

  Any leading axes are batch axes; those of keys and values may be 1 where the queries' are
  not. The D channels are `heads` contiguous groups, which is how the reference
  implementation lays out its fused projections. With `causal`, query t, which stands at
  `position` + t of the text, sees keys 0..`position` + t. There is no padding mask: in DP-Cap padding only carries no loss. The
  softmax is taken in at least float32. Source: Vaswani et al. 2017, section 3.2.
  """
  # Heads in front: the two products then read contiguous matrices, which is faster.
  split = lambda x: jnp.swapaxes(x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), -2, -3)
  q_HxTxC, k_HxSxC, v_HxSxC = split(q_TxD), split(k_SxD), split(v_SxD)
  softmax_dtype = jnp.promote_types(q_TxD.dtype, jnp.float32)
  scores_HxTxS = jnp.einsum(
    '...htc,...hsc->...hts',
    q_HxTxC * q_HxTxC.shape[-1] ** -0.5,
    k_HxSxC,
    preferred_element_type=softmax_dtype,
  )
  if causal:
    t, s = scores_HxTxS.shape[-2:]
    seen_TxS = jnp.arange(s) <= position + jnp.arange(t)[:, None]
    scores_HxTxS = jnp.where(seen_TxS, scores_HxTxS, jnp.finfo(softmax_dtype).min)
  weights_HxTxS = jax.nn.softmax(scores_HxTxS, axis=-1).astype(v_SxD.dtype)
  out_HxTxC = jnp.einsum('...hts,...hsc->...htc', weights_HxTxS, v_HxSxC)
  return jnp.swapaxes(out_HxTxC, -2, -3).reshape(q_TxD.shape)
