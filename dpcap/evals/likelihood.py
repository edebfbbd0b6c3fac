"""How probable texts are to the captioner, given an image.

An image is encoded once, and what all texts begin with is decoded once an image; texts go on from
there. Zero-shot classification and caption retrieval rank by it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpcap import data
from dpcap.data.text import Tokenizer
from dpcap.models import PADDING
from dpcap.models.decoder import Cache

# Float32 numbers in the largest array. What a CPU's caches do not hold takes it twice as long; an
# accelerator is kept busy by larger ones, 128 MB.
_FLOATS_ON_CPU, _FLOATS_ELSEWHERE = 2**22, 2**25
_MAX_TOKENS = 256  # of a prompt with its label


class Opening(NamedTuple):
  """B images and what their texts begin with.

  Attributes:
    losses_B: summed over the tokens of the beginning.
    logs_BxV: log probabilities of the token after it.
    cache: the decoder's, from which texts go on.
  """

  losses_B: jax.Array
  logs_BxV: jax.Array
  cache: Cache


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
  """[CLS] text [SEP], without padding."""
  tokens = tokenizer.encode(text, _MAX_TOKENS).tolist()
  return tokens[: tokens.index(tokenizer.sep_id) + 1]


def open_texts(
  model: nn.Module, variables: Any, memory_BxSxD: jax.Array, tokens: Sequence[int], length: int
) -> Opening:
  """Decodes what texts of up to `length` tokens begin with, [CLS] at least, for each image."""
  tokens_Bx1xT = jnp.broadcast_to(jnp.asarray(tokens), (len(memory_BxSxD), 1, len(tokens)))
  logits, cache = model.apply(
    variables, memory_BxSxD[:, None], tokens_Bx1xT, length, method='start'
  )
  logs = jax.nn.log_softmax(logits.astype(jnp.float32))
  known = jnp.take_along_axis(logs[..., :-1, :], tokens_Bx1xT[..., 1:, None], -1)
  return Opening(-known.sum((-1, -2, -3)), logs[:, 0, -1], cache)


def summed_losses(
  model: nn.Module, variables: Any, opening: Opening, rest_NxR: jax.Array
) -> jax.Array:
  """Summed token losses (B, N) of N texts for each image.

  Args:
    model: the captioner.
    variables: its variables.
    opening: what they begin with.
    rest_NxR: what follows, up to [SEP]; padding after it carries no loss.
  """
  batch, (n, r) = len(opening.losses_B), rest_NxR.shape
  summed_BxN = opening.losses_B[:, None] - opening.logs_BxV[:, rest_NxR[:, 0]]
  if r == 1:
    return summed_BxN
  tokens, targets = (
    jnp.broadcast_to(part[None], (batch, n, r - 1)) for part in (rest_NxR[:, :-1], rest_NxR[:, 1:])
  )
  logits, _ = model.apply(variables, opening.cache, tokens, method='extend')
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - chosen
  return summed_BxN + losses.sum(-1, where=targets != PADDING)


def texts_at_once(model: nn.Module, batch: int, length: int) -> int:
  """How many texts of so many tokens are computed at a time, for a batch of images."""
  floats = _FLOATS_ON_CPU if jax.default_backend() == 'cpu' else _FLOATS_ELSEWHERE
  widest = max(model.vocab_size, 8 * model.decoder_width)
  return max(1, floats // (batch * length * widest))


def text_losses(
  model: nn.Module, variables: Any, memory_BxSxD: jax.Array, texts: Sequence[list[int]]
) -> jax.Array:
  """Mean token loss (B, N) of each of N texts for each image, to be compiled with the texts in it.

  Texts of one length go together, so that nothing is computed for padding.

  Args:
    model: the captioner.
    variables: its variables.
    memory_BxSxD: of the images.
    texts: [CLS] text [SEP] each, two tokens or more; public ones, for programs are kept on disk.
  """
  lengths = np.array([len(text) for text in texts])
  shared = 1
  while shared < lengths.min() - 1 and len({text[shared] for text in texts}) == 1:
    shared += 1
  batch = len(memory_BxSxD)
  opening = open_texts(model, variables, memory_BxSxD, texts[0][:shared], int(lengths.max()))
  losses_BxN = jnp.zeros((batch, len(texts)))
  for length in np.unique(lengths):
    numbers = np.flatnonzero(lengths == length)
    rest_NxR = np.array([texts[i][shared:] for i in numbers])
    some = min(len(numbers), texts_at_once(model, batch, rest_NxR.shape[1]))
    chunks = jnp.asarray(_in_chunks(rest_NxR, some))
    summed = jax.lax.map(lambda rest: summed_losses(model, variables, opening, rest), chunks)
    summed_BxN = jnp.moveaxis(summed, 0, 1).reshape(batch, -1)[:, : len(numbers)]
    losses_BxN = losses_BxN.at[:, numbers].set(summed_BxN / (length - 1))
  return losses_BxN


def make_scorer(
  model: nn.Module, texts_NxL: np.ndarray, batch: int
) -> Callable[[Any, jax.Array], np.ndarray]:
  """The function (variables, uint8 images (B, H, W, 3)) -> summed token losses (B, N) of the texts.

  The texts may be private: they are arguments of what is compiled. Those of about one length go
  together, so that little is computed for padding.

  Args:
    model: the captioner.
    texts_NxL: int32, [CLS] text [SEP] and padding.
    batch: images at a time.
  """
  lengths = np.sum(texts_NxL[:, 1:] != PADDING, axis=1)
  order = np.argsort(lengths, kind='stable')
  longest = _round_up(lengths.max())
  some = min(len(order), texts_at_once(model, batch, longest))
  rest_NxR = np.zeros((len(order), longest), np.int32)
  rest_NxR[:, : lengths.max()] = texts_NxL[order, 1 : 1 + lengths.max()]
  chunks = [
    chunk[:, : _round_up(np.max(np.sum(chunk != PADDING, axis=1)))]
    for chunk in _in_chunks(rest_NxR, some)
  ]
  places = np.argsort(order)

  def score(variables, images):
    opening = _begin(model, variables, images, texts_NxL[0, :1], 1 + longest)
    parts = [_go_on(model, variables, opening, chunk) for chunk in chunks]
    return np.concatenate(jax.device_get(parts), axis=1)[:, places]

  return score


@functools.partial(jax.jit, static_argnames=('model', 'length'))
def _begin(model, variables, images, tokens, length):
  memory = model.apply(variables, data.normalize(images), method='memory')
  return open_texts(model, variables, memory, tokens, length)


_go_on = jax.jit(summed_losses, static_argnames='model')


def _round_up(length: int) -> int:
  """The next of 1 to 8, 10, 12, 14, 16, 20, ...: each length is a program to compile."""
  step = 2 ** max(0, int(length - 1).bit_length() - 3)
  return -(-int(length) // step) * step


def _in_chunks(rows_NxR: np.ndarray, size: int) -> np.ndarray:
  """Rows (chunks, size, R); the last chunk is filled up with the first rows."""
  n, r = rows_NxR.shape
  chunks = -(-n // size)
  return np.resize(rows_NxR, (chunks * size, r)).reshape(chunks, size, r)
