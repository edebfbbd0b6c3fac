"""A WordPiece vocabulary of words that icons have, from design sets that nobody trains on."""

import collections
import string
from collections.abc import Iterable

from tools.icon_parts.drawing import CONCEPTS

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')

_LEAST = 2  # captions that hold a word; a name of one icon alone is no word that others use
_PIECE_LEAST = 10  # of a word that may stand within others, as 'phone' in 'smartphone'
_PIECE_LENGTHS = range(3, 7)


def make_vocabulary(captions: Iterable[str]) -> list[str]:
  """The entries, a line each in the file: special ones, letters, words by how often they occur.

  Every caption of letters and digits can be spelled with it. Concepts are words in any case.

  Args:
    captions: of pictures whose names are public.
  """
  counts = collections.Counter(word for caption in captions for word in set(caption.lower().split()))
  letters = [*string.ascii_lowercase, *string.digits]
  usual = [
    word
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if count >= _LEAST and word.isascii() and word.isalnum()
  ]
  pieces = [w for w in usual if counts[w] >= _PIECE_LEAST and len(w) in _PIECE_LENGTHS]
  entries = [*SPECIAL, *letters, *(f'##{x}' for x in letters), *usual, *CONCEPTS]
  return list(dict.fromkeys([*entries, *(f'##{word}' for word in pieces)]))
