"""From captions to token ids and back.

All tokenizers lay a caption out as [CLS] caption [SEP] [PAD]... in a fixed length, id 0 being
padding. None of them is learnt here: a vocabulary made from private captions would leak them.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import tokenizers

from dpcap.errors import UserError

TOKENIZERS = ('bytes', 'wordpiece')


class Tokenizer(Protocol):
  """Turns captions into ids; can be pickled.

  Attributes:
    vocab_size: number of ids.
    pad_id: id that fills up to the length, 0.
    cls_id: id that opens a caption.
    sep_id: id that closes a caption.
  """

  vocab_size: int
  pad_id: int
  cls_id: int
  sep_id: int

  def encode(self, caption: str, length: int) -> np.ndarray:
    """Returns int32 (length,): [CLS] caption [SEP] [PAD]..., the caption cut so that [SEP] fits."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text before the first [SEP], without [PAD], [CLS] and unknown ids."""


def _frame(tokenizer: Tokenizer, ids: list[int], length: int) -> np.ndarray:
  if length < 2:
    raise ValueError(f'text length is {length}, but [CLS] and [SEP] alone take 2')
  framed = np.full(length, tokenizer.pad_id, np.int32)
  body = ids[: length - 2]
  framed[0] = tokenizer.cls_id
  framed[1 : len(body) + 1] = body
  framed[len(body) + 1] = tokenizer.sep_id
  return framed


def _unframe(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
  body = []
  for token in map(int, ids):
    if token == tokenizer.sep_id:
      break
    if token not in (tokenizer.pad_id, tokenizer.cls_id):
      body.append(token)
  return body


class BytesTokenizer:
  """One id per UTF-8 byte: needs no vocabulary, has no unknown words. See `Tokenizer`."""

  pad_id = 0
  cls_id = 1
  sep_id = 2
  _first_byte = 3
  vocab_size = _first_byte + 256

  def encode(self, caption: str, length: int) -> np.ndarray:
    """See `Tokenizer`."""
    return _frame(self, [self._first_byte + b for b in caption.encode()], length)

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer`; bytes that are not UTF-8 show as U+FFFD."""
    body = (token - self._first_byte for token in _unframe(self, ids))
    return bytes(b for b in body if 0 <= b < 256).decode(errors='replace')


class WordPieceTokenizer:
  """BERT's uncased WordPiece over a vocabulary file. See `Tokenizer`.

  Args:
    vocab_file: one token a line, its id being the line number from 0. With the official
      bert-base-uncased file: 30,522 ids, [UNK] = 100, [CLS] = 101, [SEP] = 102.

  Raises:
    UserError: the file cannot be read, or has not [PAD] first and [UNK], [CLS] and [SEP] anywhere.
  """

  pad_id = 0

  def __init__(self, vocab_file: str):
    try:
      with open(vocab_file, encoding='utf-8-sig', newline='\n') as file:
        lines = [line.rstrip('\r\n') for line in file]
    except (OSError, UnicodeError) as error:
      raise UserError(
        f'vocabulary {vocab_file}: cannot be read ({error}); expected text, one token a line'
      ) from error
    ids = {token: i for i, token in enumerate(lines)}
    missing = [token for token in ('[PAD]', '[UNK]', '[CLS]', '[SEP]') if token not in ids]
    if missing:
      raise UserError(
        f'vocabulary {vocab_file}: lacks {", ".join(missing)}; expected a BERT vocabulary'
      )
    if ids['[PAD]'] != self.pad_id:
      raise UserError(
        f'vocabulary {vocab_file}: [PAD] has id {ids["[PAD]"]}; expected it on line 1, id 0'
      )
    self.vocab_size = len(lines)
    self.cls_id = ids['[CLS]']
    self.sep_id = ids['[SEP]']
    # The special tokens are not registered with it: a caption that spells "[SEP]" stays text.
    self._tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token='[UNK]'))
    self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    self._tokenizer.decoder = tokenizers.decoders.WordPiece()

  def encode(self, caption: str, length: int) -> np.ndarray:
    """See `Tokenizer`."""
    return _frame(self, self._tokenizer.encode(caption).ids, length)

  def decode(self, ids: Iterable[int]) -> str:
    """See `Tokenizer`; the text is lower case, as the ids are."""
    body = [token for token in _unframe(self, ids) if token < self.vocab_size]
    return self._tokenizer.decode(body)


TOKENIZERS = ('bytes', 'wordpiece')


def make_tokenizer(name: str, vocabulary: str | None = None) -> Tokenizer:
  """Returns the tokenizer of that name: 'bytes', or 'wordpiece' with its vocabulary file.

  Raises:
    UserError: an unknown name, a vocabulary that is missing, or one that would go unused.
  """
  if name == 'bytes':
    if vocabulary:
      raise UserError(f"tokenizer 'bytes' takes no vocabulary, got {vocabulary!r}; expected none")
    return BytesTokenizer()
  if name == 'wordpiece':
    if not vocabulary:
      raise UserError(
        "tokenizer 'wordpiece' has no vocabulary; expected a file, such as BERT's vocab.txt"
      )
    return WordPieceTokenizer(vocabulary)
  raise UserError(f'tokenizer is {name!r}; allowed: {", ".join(map(repr, TOKENIZERS))}')
