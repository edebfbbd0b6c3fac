"""BLEU-4 and CIDEr-D of captions, one reference or more each, words parted by spaces.

Own implementations in a page, for a reason: pycocoevalcap, which has both, brings Java programs and
pycocotools and is hardly kept; sacrebleu is kept but has no CIDEr; others bring PyTorch. The figures
are those of pycocoevalcap and sacrebleu to nine digits (see the tests). Captions that
have been through WordPiece and back are in lower case with their punctuation parted; those of the
bytes tokenizer are compared as they stand. Published figures were tokenised by other rules.
"""

import collections
import math
from collections.abc import Sequence

_N = 4
_SIGMA = 6.0  # of CIDEr-D's penalty, in words


def bleu4(written: Sequence[str], given: Sequence[Sequence[str]]) -> float:
  """BLEU-4 of a corpus, 0 to 1, unsmoothed (Papineni et al. 2002).

  Args:
    written: captions (n).
    given: references of each, one or more.
  """
  matched, possible = [0] * _N, [0] * _N
  length = reference_length = 0
  for text, references in zip(written, given, strict=True):
    words, others = text.split(), [reference.split() for reference in references]
    length += len(words)
    reference_length += min((abs(len(r) - len(words)), len(r)) for r in others)[1]
    for n in range(1, _N + 1):
      most = collections.Counter()
      for other in others:
        most |= _ngrams(other, n)
      counts = _ngrams(words, n)
      matched[n - 1] += (counts & most).total()
      possible[n - 1] += counts.total()
  if not all(matched):
    return 0.0
  precision = math.exp(sum(math.log(a / b) for a, b in zip(matched, possible)) / _N)
  return precision * min(1.0, math.exp(1 - reference_length / length))


def cider_d(written: Sequence[str], given: Sequence[Sequence[str]]) -> float | None:
  """CIDEr-D of a corpus, 0 to 10 (Vedantam et al. 2015, section 5), document counts from `given`.

  Words are not stemmed, as in the authors' code.

  Args:
    written: captions (n).
    given: references of each, one or more.

  Returns:
    The score; None where document counts say nothing, for one image alone or images with the same
    references: words weigh by how few images have them, and there all weigh 0, right or wrong.
  """
  total, weighed = 0.0, False
  for n in range(1, _N + 1):
    documents = collections.Counter()
    for references in given:
      documents.update({gram for reference in references for gram in _ngrams(reference.split(), n)})
    rarity = lambda gram: math.log(len(given) / max(1, documents[gram]))
    weighed = weighed or any(map(rarity, documents))
    weigh = lambda text: {g: c * rarity(g) for g, c in _ngrams(text.split(), n).items()}
    for text, references in zip(written, given, strict=True):
      vector = weigh(text)
      for reference in references:
        other = weigh(reference)
        product = sum(min(w, other.get(g, 0.0)) * other.get(g, 0.0) for g, w in vector.items())
        norms = math.sqrt(sum(w * w for w in vector.values()) * sum(w * w for w in other.values()))
        apart = len(text.split()) - len(reference.split())
        penalty = math.exp(-apart * apart / (2 * _SIGMA**2))
        total += penalty * product / norms / len(references) if norms else 0.0
  return 10 * total / (_N * len(written)) if weighed else None


def _ngrams(words: Sequence[str], n: int) -> collections.Counter:
  return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
