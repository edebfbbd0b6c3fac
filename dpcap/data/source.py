"""Where examples come from: the interface that every source of image-text pairs has.

A source is random access, so that Poisson sampling is exact and costs nothing for the
examples that were not drawn. Its length is part of the privacy statement (q = expected
batch / N): it is fixed when the source is built, and a pair that turns out to be unusable
raises `BadRecord` when it is read instead of leaving the count.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from dpcap.data.contents import Contents

# Far beyond what any text length in use can hold; keeps a 1 MB caption from costing anything.
MAX_CAPTION_CHARS = 4096


class BadRecord(Exception):
  """A record that was drawn but cannot be used; the message is the reason.

  It still counts as drawn and contributes zero to the sum of gradients.
  """


class Record(TypedDict):
  """One image-text pair as it lies in the source, nothing decoded or checked yet."""

  image: bytes | np.ndarray  # an encoded image file, or uint8 of shape (H, W, 3)
  caption: str | bytes | list | None  # of a list one counts, see choose_caption
  label: int  # an index into the source's class_names; -1: none


class Source(Protocol):
  """A fixed number of records by index.

  A source can be pickled: each worker process gets a copy and opens files there, on first use.

  A record is the unit of privacy: what one index gives has no more of a step than one example.
  Where it is a group of near duplicates, the source has an attribute `groups`
  (`dpcap.data.groups`), and one sample of the group is read. Elsewhere record i is sample i.

  Attributes:
    class_names: the name of each label, empty where the source has no labels.
    fingerprint: changes when the records do, as far as that can be told without reading them.
    contents: what the records are, so that two sources can be told apart.
  """

  class_names: tuple[str, ...]
  fingerprint: str
  contents: Contents

  def __len__(self) -> int:
    """The number of records, good and bad: the N of the privacy statement."""

  def __getitem__(self, index: int) -> Record:
    """Reads one record.

    Raises:
      BadRecord: the record is damaged.
      IndexError: the index is not in [0, len(self)).
    """


def read_each(
  source: Source,
  indices: Sequence[int],
  rngs: Sequence[np.random.Generator] | None = None,
) -> Iterator[Record | BadRecord]:
  """The record of each index in turn, or why it is bad.

  Args:
    source: of the records.
    indices: of records.
    rngs: a generator for each, which draws one of a group; None: the first. Where there is no
      choice nothing is drawn.

  Raises:
    IndexError: an index is out of range.
  """
  groups = getattr(source, 'groups', None)
  if groups:
    rngs = [None] * len(indices) if rngs is None else rngs
    indices = [groups.record(*each) for each in zip(indices, rngs, strict=True)]
  yield from read_samples(source, indices)


def read_samples(source: Source, numbers: Sequence[int]) -> Iterator[Record | BadRecord]:
  """Each of these samples in turn, or why it is bad.

  A source may have a method `read_samples(numbers)` of its own, which knows all that a batch needs
  and can fetch it ahead. One whose records are groups must have it.
  """
  if hasattr(source, 'read_samples'):
    yield from source.read_samples(numbers)
    return
  for number in numbers:
    try:
      yield source[number]
    except BadRecord as bad:
      yield bad


def parse_fields(data: bytes | None) -> dict[str, Any]:
  """The fields of a record's JSON object; none where there is no JSON.

  Raises:
    BadRecord: it is damaged, nested too deeply, or no object.
  """
  try:
    fields = json.loads(data) if data else {}
  except (ValueError, RecursionError) as error:
    raise BadRecord(f'json member is damaged: {error}') from error
  if not isinstance(fields, dict):
    raise BadRecord(f'json member is a {type(fields).__name__}, not an object')
  return fields


def check_label(label: Any) -> str | int | float | None:
  """Returns the label, as it stands in a record's JSON, if it is one.

  Raises:
    BadRecord: it is a list or an object.
  """
  if label is not None and not isinstance(label, (str, int, float)):
    raise BadRecord(f'label is a {type(label).__name__}, not a name or a number')
  return label


def choose_caption(
  caption: str | bytes | list | None, rng: np.random.Generator | None = None
) -> str:
  """The caption of a record, of several one, as `check_caption` returns it.

  A list is one caption drawn at random, each with the same probability, so that training sees all
  of them and the pair still is one record. Nothing is drawn where there is no choice.

  Args:
    caption: as the record has it.
    rng: what draws; None: the first of a list.

  Raises:
    BadRecord: as `check_caption`, of the one that was drawn.
  """
  if isinstance(caption, list):
    if len(caption) < 2 or rng is None:
      caption = caption[0] if caption else None
    else:
      caption = caption[int(rng.integers(len(caption)))]
  return check_caption(caption)


def check_caption(caption: str | bytes | None) -> str:
  """Returns the caption as a stripped string of at most `MAX_CAPTION_CHARS` characters.

  A byte-order mark at its beginning, which some editors write, is left out.

  Raises:
    BadRecord: there is no caption, it is blank, or it is not UTF-8.
  """
  if caption is None:
    raise BadRecord('no caption')
  try:
    if isinstance(caption, bytes):
      # The cut may fall inside a character: the incremental decoder leaves that one out.
      cut = caption[: 4 * MAX_CAPTION_CHARS]
      caption = codecs.getincrementaldecoder('utf-8')().decode(cut, final=len(cut) == len(caption))
    elif not isinstance(caption, str):
      raise BadRecord(f'caption is {type(caption).__name__}, not text')
    caption = caption[:MAX_CAPTION_CHARS].removeprefix('\ufeff').strip()
    caption.encode('utf-8')  # JSON can smuggle in lone surrogates
  except UnicodeError as error:
    raise BadRecord(f'caption is not UTF-8: {error.reason}') from error
  if not caption:
    raise BadRecord('empty caption')
  return caption
