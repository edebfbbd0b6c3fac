"""BLEU-4 and CIDEr-D against direct computations with arrays, and known values."""

import itertools
import math
import random

import numpy as np
import pytest

from dpcap.evals.caption_scores import bleu4, cider_d

WORDS = 'a red ring left of blue'.split()


def draw(rng, n):
  return [' '.join(rng.choice(WORDS, rng.integers(4, 12))) for _ in range(n)]


def vectors(texts, n):
  """Counts (texts, all possible n-grams)."""
  grams = list(itertools.product(WORDS, repeat=n))
  counts = np.zeros((len(texts), len(grams)))
  for row, text in zip(counts, texts):
    words = text.split()
    for i in range(len(words) - n + 1):
      row[grams.index(tuple(words[i : i + n]))] += 1
  return counts


def test_agree_with_arrays():
  rng = np.random.default_rng()
  written, given = draw(rng, 6), [draw(rng, 2) for _ in range(6)]
  # What is written shares much with the reference, so that no precision is zero.
  written = [f'{text} {references[0]}' for text, references in zip(written, given)]
  logs, score = 0.0, 0.0
  for n in range(1, 5):
    mine = vectors(written, n)
    theirs = np.stack([vectors([r[k] for r in given], n) for k in range(2)])
    logs += math.log(np.minimum(mine, theirs.max(0)).sum() / mine.sum())
    idf = np.log(6 / np.maximum(1, (theirs > 0).any(0).sum(0)))
    for i, k in itertools.product(range(6), range(2)):
      a, b = mine[i] * idf, theirs[k, i] * idf
      apart = len(written[i].split()) - len(given[i][k].split())
      norms = np.linalg.norm(a) * np.linalg.norm(b)
      cosine = (np.minimum(a, b) @ b) / norms if norms else 0.0
      score += cosine * math.exp(-(apart**2) / 72)
  length = sum(len(text.split()) for text in written)
  closest = 0
  for text, references in zip(written, given):
    n = len(text.split())
    closest += sorted((abs(len(r.split()) - n), len(r.split())) for r in references)[0][1]
  brevity = min(1, math.exp(1 - closest / length))
  assert bleu4(written, given) == pytest.approx(brevity * math.exp(logs / 4))
  assert cider_d(written, given) == pytest.approx(10 * score / (4 * 6 * 2))


def test_known_values():
  texts = ['a red ring left', 'of blue red red']
  same = [[text] for text in texts]
  assert bleu4(texts, same) == pytest.approx(1) and cider_d(texts, same) == pytest.approx(10)
  assert bleu4(['', ''], same) == 0 and cider_d(['', ''], same) == 0


@pytest.mark.parametrize(
  'given', [[['a red ring']], [['a red ring', 'a ring']], [['a red ring']] * 3]
)
def test_no_cider_where_all_words_are_in_all_images(given):
  """It would be 0 for a perfect caption."""
  for caption in ('a red ring', 'something else'):
    assert cider_d([caption] * len(given), given) is None
  assert cider_d(['a red ring', 'a'], [['a red ring'], ['a']]) > 0


def test_agree_with_published_programs():
  """Figures of pycocoevalcap 1.2 (both) and sacrebleu 2 (BLEU), on texts from a fixed seed."""
  generator = random.Random(7)
  words = 'a b c d e f g h the red on of'.split()

  def text():
    return ' '.join(generator.choice(words) for _ in range(generator.randint(4, 12)))

  written = [text() for _ in range(40)]
  given = [
    [' '.join(word for word in t.split() if generator.random() > 0.25) + ' red on', text()]
    for t in written
  ]
  assert bleu4(written, given) == pytest.approx(0.5115637272891971, rel=1e-9)
  assert cider_d(written, given) == pytest.approx(3.0341836064956680, rel=1e-9)
