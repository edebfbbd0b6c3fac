"""Captions that the model writes for held-out images, against the ones they come with."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals import decoding
from dpcap.evals.caption_scores import bleu4, cider_d
from dpcap.evals.captioned import CaptionedBatches
from dpcap.evals.evaluator import SOURCES, Evaluator, at_a_time
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.subject import Result, Subject
from dpcap.key import NOT_NEGATIVE, POSITIVE, Key
from dpcap.models import PADDING

_LARGEST_EXPONENT = 700.0  # beyond, exp overflows; so lost a model is no better described


def evaluate(
  subject: Subject,
  *,
  source,
  images: int | None,
  batch_size: int,
  method: str,
  max_tokens: int | None,
  **options,
) -> Result:
  """Captions the first usable images of a source.

  Args:
    subject: the model.
    source: source section of the config.
    images: how many; None: all.
    batch_size: images at a time.
    method: one of `decoding.METHODS`.
    max_tokens: of a caption, [CLS] and [SEP] included; None: as many as in training.
    options: of the method, see `decoding.make_writer`.

  Returns:
    The share of captions that equal one of the source's own word by word (`exact_match`). The
    details have the `perplexity` of the source's own, the first of each image, that is exp of the
    mean loss of all their tokens ([SEP] counted in), `bleu4` (0 to 1) and `cider_d` (0 to 10, or
    None) by `caption_scores`, `left_out`, and list for every image what was written, the first
    caption (`given`), and its others where there are some.

  Raises:
    UserError: if no image of the source can be used.
  """
  records = subject.make_source(source)
  tokenizer = subject.transform.tokenizer
  losses_of = jax.jit(functools.partial(_summed_losses, subject.model))
  length = max_tokens or subject.transform.text_length
  write = decoding.make_writer(subject.model, tokenizer, method, length, **options)

  def compute(batch):
    given = batch.images, batch.first_tokens, batch.numbers
    pixels, tokens, numbers = (batches_lib.spread(x, batch_size) for x in given)
    written = np.asarray(write(subject.variables, pixels, numbers))
    sums = np.asarray(losses_of(subject.variables, pixels, tokens))
    return written[: len(batch.numbers)], sums[: len(batch.numbers)], batch._replace(images=None)

  captions, loss, count, seen = [], 0.0, 0, 0
  batches = CaptionedBatches(records, subject.transform, range(len(records)), batch_size)
  answers = batches_lib.each(subject, f'captions by {method}', batches, compute)
  with contextlib.closing(answers):
    for written, sums, batch in answers:
      found = len(batch.numbers)
      wanted = found if images is None else min(found, images - len(captions))
      loss += float(sums[:wanted].sum())
      count += int(np.sum(batch.first_tokens[:wanted, 1:] != tokenizer.pad_id))
      # Captions as the model could have written them: through the tokenizer and back.
      text = lambda tokens: tokenizer.decode(tokens[1:])
      for row in range(wanted):
        first, *others = map(text, batch.tokens[batch.owners == row])
        entry = {'index': int(batch.numbers[row]), 'written': text(written[row]), 'given': first}
        captions.append(entry | ({'others': others} if others else {}))
      seen = min(seen + batch_size, len(records))
      if len(captions) == images:
        seen = captions[-1]['index'] + 1
        break
  if not captions:
    raise UserError('captions: the source has no usable image')
  written = [entry['written'] for entry in captions]
  given = [[entry['given'], *entry.get('others', ())] for entry in captions]
  value = float(np.mean([text in own for text, own in zip(written, given)]))
  return Result(
    metric='exact_match',
    value=value,
    n=len(captions),
    details={
      'interval95': wilson_interval(value, len(captions)),
      'perplexity': math.exp(min(loss / count, _LARGEST_EXPONENT)),
      'bleu4': bleu4(written, given),
      'cider_d': cider_d(written, given),
      'left_out': seen - len(captions),
      'method': method,
      'captions': captions,
    },
  )


def _summed_losses(model, variables, images, tokens_BxL):
  """The loss (B,) of each caption, summed over its tokens."""
  means = model.apply(variables, data.normalize(images), tokens_BxL)
  return means * jnp.sum(tokens_BxL[:, 1:] != PADDING, axis=1)


EVALUATOR = Evaluator(
  evaluate,
  {
    'source': SOURCES,
    'images': Key(
      int, 24, 'how many held-out images to caption; None: all', check=POSITIVE, optional=True
    ),
    'batch_size': at_a_time(32),
    'max_tokens': Key(
      int,
      None,
      'of a caption, [CLS] and [SEP] included; None: data.text_length',
      check=(lambda x: x > 1, 'above 1'),
      optional=True,
    ),
    'method': Key(str, 'greedy', 'how captions are written', tuple(decoding.METHODS)),
    'beams': Key(int, None, 'of method beam; None: 4', check=POSITIVE, optional=True),
    'length_penalty': Key(
      float,
      None,
      'of method beam: log probability / tokens^length_penalty is compared; None: 1',
      check=NOT_NEGATIVE,
      optional=True,
    ),
    'top_p': Key(
      float,
      None,
      'of method nucleus: how much of the probability is drawn from; None: 0.9',
      check=(lambda x: 0 < x <= 1, 'above 0, at most 1'),
      optional=True,
    ),
    'temperature': Key(float, None, 'of method nucleus; None: 1', check=POSITIVE, optional=True),
    'seed': Key(int, None, 'of method nucleus; None: 0', check=NOT_NEGATIVE, optional=True),
  },
  needs='start',
  variants={'method': decoding.METHODS},
)
