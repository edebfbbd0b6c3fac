"""Decoding from a cache against decoding the whole text, for random tokens."""

import jax
import numpy as np

from dpcap.models import make_model

PREFIX, LENGTH, VOCABULARY = 3, 7, 23


def test_one_token_at_a_time_and_many_texts_from_one_prefix_give_the_logits_of_a_full_decode():
  rng = np.random.default_rng()
  model = make_model('captioner', size='micro', image_size=16, vocab_size=VOCABULARY)
  images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
  # Two images, three texts each, that share their prefix.
  tokens = rng.integers(VOCABULARY, size=(2, 3, LENGTH)).astype(np.int32)
  tokens[..., :PREFIX] = rng.integers(VOCABULARY, size=(2, 1, PREFIX))

  @jax.jit
  def run(images, tokens):
    keys = {'params': jax.random.key(0), 'frozen': jax.random.key(1)}
    variables = model.init(keys, images[0], tokens[0, 0])
    memory = model.apply(variables, images, method='memory')[:, None]
    start = model.apply(variables, memory, tokens[:, :1, :PREFIX], LENGTH, method='start')
    together, _ = model.apply(variables, start[1], tokens[..., PREFIX:], method='extend')
    logits, cache = start
    singly = [logits[..., -1:, :].repeat(3, 1)]
    for i in range(PREFIX, LENGTH):
      logits, cache = model.apply(variables, cache, tokens[..., i : i + 1], method='extend')
      singly.append(logits)
    wide = memory.repeat(3, 1)
    return together, singly, model.apply(variables, wide, tokens, method='decode')

  together, singly, expected = run(images, tokens)
  np.testing.assert_allclose(together, expected[..., PREFIX:, :], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    np.concatenate(singly, axis=-2), expected[..., PREFIX - 1 :, :], rtol=1e-4, atol=1e-5
  )
