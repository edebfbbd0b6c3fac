"""Captions that the model writes for held-out images, greedily."""

import jax
import jax.numpy as jnp
import numpy as np

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.evals.subject import Result, Subject


def evaluate(subject: Subject, *, source, images: int) -> Result:
  """Captions the first usable images of a source.

  Args:
    subject: the model.
    source: source section of the config.
    images: how many.

  Returns:
    The share of captions that equal the source's own word by word (`exact_match`); the
    details list both for every image.

  Raises:
    UserError: if no image of the source can be used.
  """
  records = subject.make_source(source)
  kept, examples = [], []
  for index in range(len(records)):
    try:
      record = records[index]
      examples.append(subject.transform(record, None))
      kept.append(index)
    except BadRecord:
      continue
    if len(kept) == images:
      break
  if not kept:
    raise UserError('captions: the source has no usable image')
  pixels = np.stack([example.image for example in examples])
  tokenizer = subject.transform.tokenizer
  tokens = greedy(subject, pixels, subject.transform.text_length)
  # The caption as the model could have written it: through the tokenizer and back.
  written = [tokenizer.decode(row[1:]) for row in tokens]
  given = [tokenizer.decode(example.tokens[1:]) for example in examples]
  return Result(
    metric='exact_match',
    value=float(np.mean([a == b for a, b in zip(written, given)])),
    n=len(kept),
    details={
      'captions': [
        {'index': index, 'written': a, 'given': b} for index, a, b in zip(kept, written, given)
      ]
    },
  )


def greedy(subject: Subject, images: np.ndarray, length: int) -> np.ndarray:
  """The most probable next token, again and again.

  Args:
    subject: the model.
    images: uint8 (B, H, W, 3).
    length: tokens to write, [CLS] included.

  Returns:
    int32 (B, length); what follows the first [SEP] means nothing.
  """
  tokenizer = subject.transform.tokenizer
  tokens_BxL = jnp.full((len(images), length), tokenizer.pad_id, jnp.int32)
  tokens_BxL = tokens_BxL.at[:, 0].set(tokenizer.cls_id)

  @jax.jit
  def write(images, tokens_BxL):
    memory = subject.model.apply(subject.variables, data.normalize(images), method='memory')

    def add(i, tokens_BxL):
      logits = subject.model.apply(subject.variables, memory, tokens_BxL, method='decode')
      return tokens_BxL.at[:, i + 1].set(jnp.argmax(logits[:, i], axis=-1))

    return jax.lax.fori_loop(0, length - 1, add, tokens_BxL)

  return np.asarray(write(images, tokens_BxL))
