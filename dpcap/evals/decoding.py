"""How captions are written: greedily, by beam search, or sampled from the nucleus.

All write token by token from the decoder's cache, a batch of images at a time, under jit.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap import data
from dpcap.data.text import Tokenizer

PyTree = Any

# method -> its own options and their values where the config says None
METHODS = {
  'greedy': {},
  'beam': {'beams': 4, 'length_penalty': 1.0},
  'nucleus': {'top_p': 0.9, 'temperature': 1.0, 'seed': 0},
}

Writer = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


def make_writer(
  model: nn.Module, tokenizer: Tokenizer, method: str, length: int, **options
) -> Writer:
  """The compiled function that writes captions.

  greedy: always the most probable next token. beam: the `beams` most probable texts so far go
  on; of those left in the end the one with the highest log probability / tokens^length_penalty
  is taken ([SEP] counts as a token; Wu et al. 2016, section 7, without its constant). nucleus:
  the next token is drawn from the fewest ones that have `top_p` of the probability together,
  at a temperature (Holtzman et al. 2020, section 3.1); the draw follows from `seed` and the
  number of the image.

  Args:
    model: the captioner.
    tokenizer: the one that it was trained with.
    method: one of METHODS.
    length: tokens, [CLS] included.
    options: of METHODS[method]; None stands for the value there.

  Returns:
    (variables, uint8 images (B, H, W, 3), numbers (B,)) -> int32 (B, length); what follows the
    first [SEP] means nothing.
  """
  options = {k: v if options.get(k) is None else options[k] for k, v in METHODS[method].items()}
  write = {'greedy': _greedy, 'beam': _beam, 'nucleus': _nucleus}[method]

  @jax.jit
  def run(variables, images, numbers):
    memory = model.apply(variables, data.normalize(images), method='memory')
    begin = lambda leading: jnp.full((*leading, 1), tokenizer.cls_id, jnp.int32)
    start = lambda memory, leading: model.apply(
      variables, memory, begin(leading), length, method='start'
    )
    extend = lambda cache, tokens: model.apply(variables, cache, tokens, method='extend')
    return write(memory, start, extend, tokenizer, length, numbers, **options)

  return run


def _token_by_token(memory, start, extend, tokenizer, length, choose):
  """Texts that go on with choose(i, logits (B, V)) until all have ended."""
  batch = len(memory)
  logits, cache = start(memory, (batch,))
  tokens_BxL = jnp.full((batch, length), tokenizer.pad_id, jnp.int32)

  def unfinished(carry):
    i, _, _, _, ended_B = carry
    return (i < length) & ~jnp.all(ended_B)

  def add(carry):
    i, tokens_BxL, cache, logits_BxV, ended_B = carry
    token_B = choose(i, logits_BxV).astype(jnp.int32)
    logits, cache = extend(cache, token_B[:, None])
    ended_B |= token_B == tokenizer.sep_id
    return i + 1, tokens_BxL.at[:, i].set(token_B), cache, logits[:, -1], ended_B

  tokens_BxL = tokens_BxL.at[:, 0].set(tokenizer.cls_id)
  carry = (1, tokens_BxL, cache, logits[:, -1], jnp.zeros(batch, bool))
  return jax.lax.while_loop(unfinished, add, carry)[1]


def _greedy(memory, start, extend, tokenizer, length, numbers):
  choose = lambda i, logits_BxV: jnp.argmax(logits_BxV, axis=-1)
  return _token_by_token(memory, start, extend, tokenizer, length, choose)


def _nucleus(memory, start, extend, tokenizer, length, numbers, *, top_p, temperature, seed):
  keys_B = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)

  def choose(i, logits_BxV):
    draw = lambda key, logits: jax.random.categorical(
      jax.random.fold_in(key, i), nucleus(logits.astype(jnp.float32) / temperature, top_p)
    )
    return jax.vmap(draw)(keys_B, logits_BxV)

  return _token_by_token(memory, start, extend, tokenizer, length, choose)


def nucleus(logits_V: jax.Array, top_p: float) -> jax.Array:
  """The logits of the fewest tokens that have `top_p` of the probability; -inf elsewhere."""
  order_V = jnp.argsort(-logits_V)
  probability_V = jax.nn.softmax(logits_V)[order_V]
  before_V = jnp.cumsum(probability_V) - probability_V
  kept_V = jnp.zeros(len(logits_V), bool).at[order_V].set(before_V < top_p)
  kept_V = kept_V.at[order_V[0]].set(True)
  return jnp.where(kept_V, logits_V, -jnp.inf)


def _beam(memory, start, extend, tokenizer, length, numbers, *, beams, length_penalty):
  batch = len(memory)
  logits, cache = start(memory[:, None], (batch, 1))
  vocab_size = logits.shape[-1]
  # Every beam gets a cache of its own; what belongs to the image stays shared.
  spread = lambda x: jnp.broadcast_to(x, (batch, beams, *x.shape[2:]))
  cache = cache._replace(
    blocks=tuple(
      block._replace(keys_LxD=spread(block.keys_LxD), values_LxD=spread(block.values_LxD))
      for block in cache.blocks
    )
  )
  # A beam that has ended goes on with padding only, at no cost.
  only_padding_V = jnp.full(vocab_size, -jnp.inf).at[tokenizer.pad_id].set(0.0)

  def unfinished(carry):
    i, *_, ended_BxK = carry
    return (i < length) & ~jnp.all(ended_BxK)

  def add(carry):
    i, tokens_BxKxL, scores_BxK, cache, logits_BxKxV, ended_BxK = carry
    logs = jax.nn.log_softmax(logits_BxKxV.astype(jnp.float32))
    logs = jnp.where(ended_BxK[..., None], only_padding_V, logs)
    totals = (scores_BxK[..., None] + logs).reshape(batch, beams * vocab_size)
    scores_BxK, best_BxK = jax.lax.top_k(totals, beams)
    parents_BxK, token_BxK = best_BxK // vocab_size, best_BxK % vocab_size

    def of_parents(x):
      places = parents_BxK.reshape(batch, beams, *(1,) * (x.ndim - 2))
      return jnp.take_along_axis(x, places, axis=1)

    cache = cache._replace(
      blocks=tuple(
        block._replace(keys_LxD=of_parents(block.keys_LxD), values_LxD=of_parents(block.values_LxD))
        for block in cache.blocks
      )
    )
    logits, cache = extend(cache, token_BxK[..., None])
    tokens_BxKxL = of_parents(tokens_BxKxL).at[:, :, i].set(token_BxK)
    ended_BxK = of_parents(ended_BxK) | (token_BxK == tokenizer.sep_id)
    return i + 1, tokens_BxKxL, scores_BxK, cache, logits[..., -1, :], ended_BxK

  tokens_BxKxL = jnp.full((batch, beams, length), tokenizer.pad_id, jnp.int32)
  tokens_BxKxL = tokens_BxKxL.at[:, :, 0].set(tokenizer.cls_id)
  # One beam has begun; the others are the copies that it would compete with.
  scores_BxK = jnp.broadcast_to(jnp.full(beams, -jnp.inf).at[0].set(0.0), (batch, beams))
  logits_BxKxV = jnp.broadcast_to(logits[..., -1, :], (batch, beams, vocab_size))
  ended_BxK = jnp.zeros((batch, beams), bool)
  carry = (1, tokens_BxKxL, scores_BxK, cache, logits_BxKxV, ended_BxK)
  _, tokens_BxKxL, scores_BxK, *_ = jax.lax.while_loop(unfinished, add, carry)
  written_BxK = _count_written(tokens_BxKxL, tokenizer.sep_id)
  best_B = jnp.argmax(scores_BxK / written_BxK**length_penalty, axis=1)
  return jnp.take_along_axis(tokens_BxKxL, best_B[:, None, None], axis=1)[:, 0]


def _count_written(tokens_BxKxL, sep_id):
  """Tokens after [CLS] up to [SEP]; all of them where there is none."""
  ends = tokens_BxKxL == sep_id
  length = tokens_BxKxL.shape[-1]
  return jnp.where(ends.any(-1), jnp.argmax(ends, axis=-1), length - 1)
