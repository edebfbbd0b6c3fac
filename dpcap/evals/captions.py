"""Captions that the model writes for held-out images, greedily."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpcap import data
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.evals.caption_scores import bleu4, cider_d
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.subject import Result, Subject
from dpcap.models import PADDING

_LARGEST_EXPONENT = 700.0  # beyond, exp overflows; so lost a model is no better described


def evaluate(subject: Subject, *, source, images: int | None, batch_size: int) -> Result:
  """Captions the first usable images of a source.

  Args:
    subject: the model.
    source: source section of the config.
    images: how many; None: all.
    batch_size: images at a time.

  Returns:
    The share of captions that equal the source's own word by word (`exact_match`). The details
    have the `perplexity` of the source's own, that is exp of the mean loss of all their tokens
    ([SEP] counted in), `bleu4` (0 to 1) and `cider_d` (0 to 10) by `caption_scores`, `left_out`, and list both captions for every image.

  Raises:
    UserError: if no image of the source can be used.
  """
  records = subject.make_source(source)
  tokenizer = subject.transform.tokenizer
  losses_of = jax.jit(functools.partial(_summed_losses, subject.model))
  write = make_greedy(subject, subject.transform.text_length)
  captions, left_out, loss, count = [], 0, 0.0, 0
  kept, examples = [], []
  for index in range(len(records)):
    try:
      examples.append(subject.transform(records[index], None))
      kept.append(index)
    except BadRecord:
      left_out += 1
    enough = images is not None and len(captions) + len(kept) == images
    if kept and (len(kept) == batch_size or enough or index == len(records) - 1):
      # One shape for all batches: the last one is filled up, and cut again.
      fill = examples + examples[:1] * (batch_size - len(examples))
      pixels, tokens = (np.stack(some) for some in zip(*fill))
      sums = np.asarray(losses_of(subject.variables, pixels, tokens))[: len(kept)]
      loss += float(sums.sum())
      count += int(np.sum(tokens[: len(kept), 1:] != tokenizer.pad_id))
      # The caption as the model could have written it: through the tokenizer and back.
      captions += [
        {'index': i, 'written': tokenizer.decode(a[1:]), 'given': tokenizer.decode(b[1:])}
        for i, a, b in zip(kept, write(pixels), tokens)
      ]
      kept, examples = [], []
    if enough:
      break
  if not captions:
    raise UserError('captions: the source has no usable image')
  value = float(np.mean([entry['written'] == entry['given'] for entry in captions]))
  written = [entry['written'] for entry in captions]
  given = [[entry['given']] for entry in captions]
  return Result(
    metric='exact_match',
    value=value,
    n=len(captions),
    details={
      'interval95': wilson_interval(value, len(captions)),
      'perplexity': math.exp(min(loss / count, _LARGEST_EXPONENT)),
      'bleu4': bleu4(written, given),
      'cider_d': cider_d(written, given),
      'left_out': left_out,
      'captions': captions,
    },
  )


def _summed_losses(model, variables, images, tokens_BxL):
  """The loss (B,) of each caption, summed over its tokens."""
  means = model.apply(variables, data.normalize(images), tokens_BxL)
  return means * jnp.sum(tokens_BxL[:, 1:] != PADDING, axis=1)


def make_greedy(subject: Subject, length: int) -> Callable[[np.ndarray], np.ndarray]:
  """The function that writes captions, always taking the most probable next token.

  Args:
    subject: the model.
    length: tokens to write, [CLS] included.

  Returns:
    uint8 images (B, H, W, 3) -> int32 (B, length); what follows the first [SEP] means nothing.
  """
  tokenizer, model = subject.transform.tokenizer, subject.model

  @jax.jit
  def write(variables, images):
    memory = model.apply(variables, data.normalize(images), method='memory')
    tokens_BxL = jnp.full((len(images), length), tokenizer.pad_id, jnp.int32)
    tokens_BxL = tokens_BxL.at[:, 0].set(tokenizer.cls_id)
    logits, cache = model.apply(variables, memory, tokens_BxL[:, :1], length, method='start')

    def add(i, carry):
      tokens_BxL, cache, logits_BxV = carry
      token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
      logits, cache = model.apply(variables, cache, token_B[:, None], method='extend')
      return tokens_BxL.at[:, i].set(token_B), cache, logits[:, -1]

    return jax.lax.fori_loop(1, length, add, (tokens_BxL, cache, logits[:, -1]))[0]

  return lambda images: np.asarray(write(subject.variables, images))
