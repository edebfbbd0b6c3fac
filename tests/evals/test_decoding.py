"""Decoding against direct ones that look at whole texts, a token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import data
from dpcap.evals import decoding

LENGTH = 6


@pytest.fixture(name='images')
def _images():
  return np.random.default_rng().integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(name='next_logs', scope='module')
def _next_logs(subject):
  """(image, text so far) -> log probabilities of the next token, from a whole forward."""

  @jax.jit
  def decode(image, tokens):
    memory = subject.model.apply(subject.variables, data.normalize(image), method='memory')
    logits = subject.model.apply(subject.variables, memory, tokens, method='decode')
    return jax.nn.log_softmax(logits)

  def next_logs(image, text):
    padded = np.array(text + [0] * (LENGTH - len(text)), np.int32)
    return np.asarray(decode(image, padded))[len(text) - 1]

  return next_logs


def write(subject, images, method, **options):
  tokenizer = subject.transform.tokenizer
  writer = decoding.make_writer(subject.model, tokenizer, method, LENGTH, **options)
  written = np.asarray(writer(subject.variables, images, np.arange(len(images))))
  return [_until_end(tokens, tokenizer.sep_id) for tokens in written.tolist()]


def _until_end(tokens, sep_id):
  return tokens[: tokens.index(sep_id) + 1] if sep_id in tokens else tokens


@pytest.fixture(name='eager')
def _eager(subject):
  """The subject with a bias towards [SEP]: random weights seldom end a text."""
  sep_id = subject.transform.tokenizer.sep_id
  logits = subject.variables['params']['decoder']['logits']
  biased = logits | {'bias': logits['bias'].at[sep_id].add(2.0)}
  decoder = subject.variables['params']['decoder'] | {'logits': biased}
  params = subject.variables['params'] | {'decoder': decoder}
  return subject._replace(variables=subject.variables | {'params': params})


def test_greedy_takes_the_most_probable_token(subject, images, next_logs):
  tokenizer = subject.transform.tokenizer
  for image, written in zip(images, write(subject, images, 'greedy')):
    text = [tokenizer.cls_id]
    while len(text) < LENGTH and text[-1] != tokenizer.sep_id:
      text.append(int(np.argmax(next_logs(image, text))))
    assert written == text


@pytest.mark.parametrize('beams, length_penalty', [(1, 1.0), (3, 0.0), (3, 2.0)])
def test_beam_search_equals_a_direct_one(subject, images, next_logs, beams, length_penalty):
  tokenizer = subject.transform.tokenizer

  def search(image):
    alive = [([tokenizer.cls_id], 0.0)]
    for _ in range(LENGTH - 1):
      longer = []
      for text, score in alive:
        if text[-1] == tokenizer.sep_id:
          longer.append((text, score))
        else:
          logs = next_logs(image, text)
          longer += [(text + [token], score + log) for token, log in enumerate(logs)]
      alive = sorted(longer, key=lambda item: -item[1])[:beams]
    return max(alive, key=lambda item: item[1] / (len(item[0]) - 1) ** length_penalty)[0]

  options = dict(beams=beams, length_penalty=length_penalty)
  assert write(subject, images, 'beam', **options) == [search(image) for image in images]
  if beams == 1:
    assert write(subject, images, 'beam', **options) == write(subject, images, 'greedy')


def test_beams_that_end_early_are_kept(eager, images):
  """Against the scores of the texts, each from a whole forward."""
  tokenizer = eager.transform.tokenizer
  written = write(eager, images, 'beam', beams=4, length_penalty=1.0)
  assert any(len(text) < LENGTH for text in written)
  greedy = write(eager, images, 'greedy')

  @jax.jit
  def mean_log(image, tokens):
    memory = eager.model.apply(eager.variables, data.normalize(image), method='memory')
    return -eager.model.apply(eager.variables, memory, tokens, method='text_loss')

  for image, ours, other in zip(images, written, greedy):
    pad = lambda text: np.array(text + [tokenizer.pad_id] * (LENGTH - len(text)), np.int32)
    assert mean_log(image, pad(ours)) >= mean_log(image, pad(other)) - 1e-5


def test_the_nucleus_is_the_fewest_tokens_that_have_top_p():
  logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
  kept = lambda top_p: np.isfinite(decoding.nucleus(logits, top_p)).tolist()
  assert kept(0.01) == [False, True, False, False]
  assert kept(0.5) == [False, True, False, True]
  assert kept(0.75) == [False, True, True, True]
  assert kept(1.0) == [True] * 4


def test_a_tiny_nucleus_is_greedy_and_draws_follow_the_number_of_the_image(subject, images):
  sample = functools.partial(write, subject, method='nucleus')
  assert sample(images, top_p=1e-6) == write(subject, images, 'greedy')
  drawn = sample(images, top_p=1.0, seed=3)
  assert drawn == sample(images, top_p=1.0, seed=3) != sample(images, top_p=1.0, seed=4)
  assert sample(images[:2], top_p=1.0, seed=3) == drawn[:2]


def test_draws_have_the_distribution_of_the_nucleus(subject, images, next_logs):
  """First tokens of many draws for one image, by their frequencies."""
  tokenizer, count, top_p, temperature = subject.transform.tokenizer, 4000, 0.8, 0.7
  options = dict(top_p=top_p, temperature=temperature)
  writer = decoding.make_writer(subject.model, tokenizer, 'nucleus', 2, **options)
  many = np.broadcast_to(images[0], (count, *images[0].shape))
  tokens = np.asarray(writer(subject.variables, many, np.arange(count)))[:, 1]
  logs = next_logs(images[0], [tokenizer.cls_id]).astype(np.float64) / temperature
  expected = np.exp(logs - np.logaddexp.reduce(logs))
  order = np.argsort(-expected)
  kept = order[: np.searchsorted(np.cumsum(expected[order]), top_p) + 1]
  allowed = np.zeros_like(expected)
  allowed[kept] = expected[kept] / expected[kept].sum()
  found = np.bincount(tokens, minlength=len(expected))
  assert not found[allowed == 0].any()
  # Six deviations of the total variation distance of as many fair draws, roughly.
  assert np.abs(found / count - allowed).sum() / 2 < 3 * np.sqrt(len(kept) / count)
