"""Captions for an image and images for a caption, found by how likely the captioner holds them.

Three rankings come of one table of losses, that of every caption for every image:

| | ranks | by |
| --- | --- | --- |
| `text_to_image` | images for a caption | its loss |
| `image_to_text` | captions for an image | mean token loss, as in zero-shot and ARO |
| `image_to_text_ratio` | captions for an image | log p(caption given the image) - log p(caption) |

A captioner that hardly looks finds the same likely captions for every image. The ratio takes away
what a caption owes to being likely at all (Lin et al. 2023, arXiv 2306.01879): p(caption) is its
mean probability over the images of the gallery. Images for a caption need none of it: the caption
is given, so its prior and its length are the same for all of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals.captioned import CaptionedBatches
from dpcap.evals.evaluator import SOURCES, Evaluator, at_a_time
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.likelihood import make_scorer
from dpcap.evals.subject import Result, Subject
from dpcap.key import COUNTS, POSITIVE, Key
from dpcap.models import PADDING

_SEED = 0  # of the choice of images, so that the test is always the same
_SHOWN = 12  # queries of each kind whose best answers are listed
_CAPTIONS, _IMAGES = 3, 6  # how many of these


class Gallery(NamedTuple):
  """N images and M captions, each of which another token makes another one.

  Attributes:
    numbers: (N,), places of the images in the source.
    tokens: int32 (M, L).
    own: bool (N, M), whether the caption is one of the image's.
  """

  numbers: np.ndarray
  tokens: np.ndarray
  own: np.ndarray


def evaluate(
  subject: Subject, *, source, images: int | None, at: Sequence[int], batch_size: int
) -> Result:
  """Recall of captions for an image and of images for a caption; see above.

  The gallery has all captions of the images in it. Those that come out as the same tokens are one,
  which is right for every image that has it.

  Args:
    subject: the model, a captioner.
    source: captioned images, a source section of the config.
    images: how many, drawn from the source, always the same ones; None: all. Each is asked about
      every caption, and tables of that size are held (about 20 bytes a pair).
    at: how many answers count.
    batch_size: images at a time.

  Returns:
    `value` is recall at the first of `at` of captions for an image by mean token loss: the share of
    images that find one of their own among so many. It is the plain one of the three, which asks
    nothing of the other images of the gallery. The details have every ranking's recall at each
    of `at`, with interval and chance level, and for some images and captions the best answers
    (`examples`). A wrong answer that is as likely as the best right one counts as before it.
    Intervals count images as independent trials, and no more captions than there are images.

  Raises:
    UserError: if there are not two usable images with different captions.
  """
  records = subject.make_source(source)
  numbers = choose(len(records), images)
  batches = CaptionedBatches(records, subject.transform, numbers, batch_size)
  gallery = read_gallery(subject, batches)
  if len(gallery.tokens) < 2:
    raise UserError(
      'caption_retrieval: the source has not two usable images with different captions'
    )
  score = make_scorer(subject.model, gallery.tokens, batch_size)

  def compute(batch):
    losses = score(subject.variables, batches_lib.spread(batch.images, batch_size))
    return losses[: len(batch.numbers)]

  rows = batches_lib.each(subject, 'losses of captions', batches, compute)
  summed_NxM = np.concatenate(list(rows))
  targets = np.sum(gallery.tokens[:, 1:] != PADDING, axis=1, dtype=np.float32)
  losses_NxM, ratios_NxM = summed_NxM / targets, without_prior(summed_NxM)
  n = len(gallery.numbers)
  found = {
    'image_to_text': recall(losses_NxM, gallery.own, at, n),
    'image_to_text_ratio': recall(ratios_NxM, gallery.own, at, n),
    'text_to_image': recall(losses_NxM.T, gallery.own.T, at, n),
  }
  first = found['image_to_text'][str(at[0])]
  return Result(
    f'text_recall_at_{at[0]}',
    first['value'],
    n,
    {
      'interval95': first['interval95'],
      'chance': first['chance'],
      **found,
      'distinct_captions': len(gallery.tokens),
      'left_out': len(numbers) - n,
      'examples': _examples(gallery, losses_NxM, ratios_NxM, subject.transform.tokenizer),
    },
  )


def choose(total: int, images: int | None) -> Sequence[int]:
  """The places of so many records, drawn from all, in ascending order; the same every time."""
  if images is None or images >= total:
    return range(total)
  return np.sort(np.random.default_rng(_SEED).choice(total, images, replace=False))


def read_gallery(subject: Subject, batches: CaptionedBatches) -> Gallery:
  """The usable images of the batches and their captions."""
  parts = batches_lib.each(subject, 'captions', batches, lambda batch: batch._replace(images=None))
  places, numbers, pairs = {}, [], []
  for part in parts:
    for owner, tokens in zip(part.owners, part.tokens):
      place = places.setdefault(tuple(tokens.tolist()), len(places))
      pairs.append((len(numbers) + owner, place))
    numbers += part.numbers.tolist()
  own = np.zeros((len(numbers), len(places)), bool)
  for image, caption in pairs:
    own[image, caption] = True
  return Gallery(np.array(numbers, int), np.array(list(places), np.int32), own)


def without_prior(summed_NxM: np.ndarray) -> np.ndarray:
  """log p(caption) - log p(caption given the image), p(caption) being the mean over the images."""
  return summed_NxM + logsumexp(-summed_NxM, axis=0) - math.log(len(summed_NxM))


def recall(
  losses_QxA: np.ndarray, right_QxA: np.ndarray, at: Sequence[int], independent: int
) -> dict[str, dict[str, Any]]:
  """The share of queries with a right answer among the k of the lowest losses, for each k of `at`.

  Args:
    losses_QxA: of the answers to each query.
    right_QxA: which are right, one or more for each query.
    at: numbers of answers.
    independent: how many queries count as independent trials, if there are no fewer.

  Returns:
    k, as text -> `value`, `interval95` and `chance`, what answers in random order would have.
  """
  queries, answers = losses_QxA.shape
  best_right = np.min(losses_QxA, axis=1, where=right_QxA, initial=np.inf, keepdims=True)
  # NaN is not below anything, and so would be found first: a diverged model finds nothing.
  before = np.sum(~right_QxA & ~(losses_QxA > best_right), axis=1)
  found = {}
  for k in at:
    value = float(np.mean(before < k))
    found[str(k)] = {
      'value': value,
      'interval95': wilson_interval(value, min(queries, independent)),
      'chance': _chance(answers, right_QxA.sum(axis=1), min(k, answers)),
    }
  return found


def _chance(answers: int, right_Q: np.ndarray, k: int) -> float:
  """The mean probability that one of the right answers is among k drawn from all."""
  draws = math.comb(answers, k)
  counts, queries = np.unique(right_Q, return_counts=True)
  missed = [math.comb(answers - count, k) / draws for count in counts.tolist()]
  return 1 - float(np.average(missed, weights=queries))


def _examples(
  gallery: Gallery, losses_NxM: np.ndarray, ratios_NxM: np.ndarray, tokenizer: data.Tokenizer
) -> dict[str, list[dict[str, Any]]]:
  """Some images with their best captions, some captions with their best images."""
  text = lambda caption: tokenizer.decode(gallery.tokens[caption, 1:])
  number = lambda image: int(gallery.numbers[image])
  shown = lambda count: np.unique(np.linspace(0, count - 1, _SHOWN).astype(int))

  def best(losses, right, count, name):
    places = np.argsort(losses, kind='stable')[:count]
    return [{'found': name(place), 'right': bool(right[place])} for place in places]

  return {
    'images': [
      {
        'image': number(i),
        'given': [text(j) for j in np.flatnonzero(gallery.own[i])],
        'image_to_text': best(losses_NxM[i], gallery.own[i], _CAPTIONS, text),
        'image_to_text_ratio': best(ratios_NxM[i], gallery.own[i], _CAPTIONS, text),
      }
      for i in shown(len(gallery.numbers))
    ],
    'captions': [
      {
        'caption': text(j),
        'text_to_image': best(losses_NxM[:, j], gallery.own[:, j], _IMAGES, number),
      }
      for j in shown(len(gallery.tokens))
    ],
  }


EVALUATOR = Evaluator(
  evaluate,
  {
    'source': SOURCES,
    'images': Key(
      int,
      1000,
      'how many, drawn from the source, always the same; all their captions are asked; None: all',
      check=POSITIVE,
      optional=True,
    ),
    'at': Key(tuple, (1, 5, 10), 'numbers of answers', check=COUNTS),
    'batch_size': at_a_time(32),
  },
  needs='text_loss',
)
