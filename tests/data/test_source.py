import time

import pytest

from dpcap.data.source import MAX_CAPTION_CHARS, BadRecord, check_caption


@pytest.mark.parametrize(
  'caption, expected',
  [
    ('a dog', 'a dog'),
    ('  a dog\n', 'a dog'),
    (b' a dog ', 'a dog'),
    ('größe 犬 🐕'.encode(), 'größe 犬 🐕'),
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
