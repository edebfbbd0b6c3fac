"""Losses of texts that share an image, a beginning and a batch, against the model's own loss."""

import jax
import numpy as np
import pytest

from dpcap import data
from dpcap.evals import likelihood

# The longest has a length that is rounded up.
LONGEST = 'a small red ring above a large green cross left'
TEXTS = (LONGEST, 'a red ring', 'a blue', 'a', 'a red cross', 'blue')


@pytest.fixture(name='expected', scope='module')
def _expected(subject):
  """Images, texts, and the mean losses of a whole forward for every pair."""
  images = np.random.default_rng().integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
  tokens = np.stack([subject.transform.tokenizer.encode(text, 12) for text in TEXTS])
  loss = jax.jit(subject.model.apply)
  losses = [[loss(subject.variables, data.normalize(x), t) for t in tokens] for x in images]
  return images, tokens, np.array(losses)


@pytest.mark.parametrize('first', [0, 1])
def test_text_losses_are_the_models_own(subject, expected, first, monkeypatch):
  """The last text has no beginning in common with the others but [CLS]."""
  monkeypatch.setattr(likelihood, '_FLOATS_ON_CPU', 3 * 12 * 128)  # more chunks than one
  images, _, losses = expected
  texts = TEXTS[: len(TEXTS) - first]
  tokens = [likelihood.tokenize(subject.transform.tokenizer, text) for text in texts]

  @jax.jit
  def run(variables, images):
    memory = subject.model.apply(variables, data.normalize(images), method='memory')
    return likelihood.text_losses(subject.model, variables, memory, tokens)

  found = run(subject.variables, images)
  np.testing.assert_allclose(found, losses[:, : len(texts)], rtol=1e-5)


@pytest.mark.parametrize('floats', [3 * 12 * 128 * 4, 2**25])
def test_scores_are_the_models_own_whatever_goes_together(subject, expected, floats, monkeypatch):
  monkeypatch.setattr(likelihood, '_FLOATS_ON_CPU', floats)
  images, tokens, losses = expected
  score = likelihood.make_scorer(subject.model, tokens, len(images))
  summed = losses * np.sum(tokens[:, 1:] != 0, axis=1)
  np.testing.assert_allclose(score(subject.variables, images), summed, rtol=1e-5)


def test_texts_are_no_part_of_the_program(subject, expected):
  """They may be private, and programs are kept on disk."""
  images, tokens, losses = expected
  score = lambda texts: likelihood.make_scorer(subject.model, texts, 3)(subject.variables, images)
  score(tokens[[1, 2]])
  programs = likelihood._go_on._cache_size()
  other = score(tokens[[4, 5]])
  assert likelihood._go_on._cache_size() == programs
  np.testing.assert_allclose(other, losses[:, [4, 5]] * (4, 2), rtol=1e-5)
