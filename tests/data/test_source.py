import time

import numpy as np
import pytest

from dpcap.data.source import (
  MAX_CAPTION_CHARS,
  BadRecord,
  check_caption,
  check_label,
  choose_caption,
  parse_fields,
)


@pytest.mark.parametrize(
  'caption, expected',
  [
    ('a dog', 'a dog'),
    ('  a dog\n', 'a dog'),
    (b' a dog ', 'a dog'),
    ('größe 犬 🐕'.encode(), 'größe 犬 🐕'),
    (b'\xef\xbb\xbfa dog', 'a dog'),  # a byte-order mark
    ('\ufeff a dog', 'a dog'),
  ],
)
def test_good_captions(caption, expected):
  assert check_caption(caption) == expected


@pytest.mark.parametrize(
  'caption, reason',
  [
    (None, 'no caption'),
    ('', 'empty'),
    (' \n\t', 'empty'),
    (b'', 'empty'),
    (b'caf\xe9', 'UTF-8'),
    (b'\xff\xfe', 'UTF-8'),
    (b'\xef\xbb\xbf', 'empty'),
    (b'abc\xe2\x82', 'UTF-8'),
    ('\ud800', 'UTF-8'),
    (7, 'int'),
  ],
)
def test_bad_captions(caption, reason):
  with pytest.raises(BadRecord, match=reason):
    check_caption(caption)


@pytest.mark.parametrize(
  'long', ['x' * 2**20, b'x' * 2**20, '犬' * 2**20, ('a' + '犬🐕' * 2**18).encode()]
)
def test_a_long_caption_is_cut_at_no_cost(long):
  start = time.perf_counter()
  caption = check_caption(long)
  assert time.perf_counter() - start < 0.05
  assert 0 < len(caption) <= MAX_CAPTION_CHARS
  assert (long.decode() if isinstance(long, bytes) else long).startswith(caption)


def test_of_several_captions_each_is_drawn_alike():
  captions = ['one', b'two', 'three']
  drawn = [choose_caption(captions, np.random.default_rng(i)) for i in range(3000)]
  assert {text: drawn.count(text) // 100 in range(9, 11) for text in set(drawn)} == {
    'one': True,
    'two': True,
    'three': True,
  }
  assert drawn[:50] == [choose_caption(captions, np.random.default_rng(i)) for i in range(50)]
  assert choose_caption(captions) == 'one'


@pytest.mark.parametrize('caption', ['a dog', b'a dog', ['a dog']])
def test_nothing_is_drawn_where_there_is_no_choice(caption):
  """Or the crops of all data sets with one caption an image would be others."""
  one, other = np.random.default_rng(1), np.random.default_rng(1)
  assert choose_caption(caption, one) == 'a dog' and one.random() == other.random()


@pytest.mark.parametrize(
  'captions, reason', [([], 'no caption'), ([None] * 2, 'no caption'), ([['a'], ['a']], 'list')]
)
def test_lists_without_a_caption(captions, reason):
  for rng in (None, np.random.default_rng(0)):
    with pytest.raises(BadRecord, match=reason):
      choose_caption(captions, rng)


@pytest.mark.parametrize(
  'data, reason',
  [
    (b'{', 'damaged'),
    (b'\xff', 'damaged'),
    (b'[' * 100_000 + b']' * 100_000, 'damaged'),
    (b'{"a":' * 100_000 + b'1' + b'}' * 100_000, 'damaged'),
    (b'9' * 5000, 'damaged'),
    (b'[1]', 'list'),
  ],
)
def test_json_that_is_none(data, reason):
  with pytest.raises(BadRecord, match=reason):
    parse_fields(data)


def test_json_and_labels_that_are_some():
  assert parse_fields(None) == {} and parse_fields(b'\xef\xbb\xbf{"a": 1}') == {'a': 1}
  assert [check_label(label) for label in (None, 'ant', 3, 1.5)] == [None, 'ant', 3, 1.5]
  for label in ([], {}):
    with pytest.raises(BadRecord, match='label is a'):
      check_label(label)
