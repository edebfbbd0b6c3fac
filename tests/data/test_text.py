import pathlib
import pickle

import numpy as np
import pytest

from dpcap.data.text import BytesTokenizer, WordPieceTokenizer, make_tokenizer
from dpcap.errors import UserError

WORDS = ['a', 'dog', 'cat', 'play', '##ing', '##s', 'cafe', '[', ']', 'sep', ',']


@pytest.fixture
def vocab_file(tmp_path):
  # The official layout: [PAD] 0, unused up to 99, then the other special tokens.
  lines = [
    '[PAD]',
    *(f'[unused{i}]' for i in range(99)),
    '[UNK]',
    '[CLS]',
    '[SEP]',
    '[MASK]',
    *WORDS,
  ]
  file = tmp_path / 'vocab.txt'
  file.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return str(file)


def word_ids(*words):
  return [104 + WORDS.index(word) for word in words]


def test_bytes():
  tokenizer = BytesTokenizer()
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (
    259,
    0,
    1,
    2,
  )
  ids = tokenizer.encode('ab', 6)
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, [1, 3 + 97, 3 + 98, 2, 0, 0])
  for caption in ['a dog', 'größe 犬 🐕', '\0\xff']:
    ids = tokenizer.encode(caption, 40)
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == caption


def test_bytes_that_are_no_text_decode_all_the_same():
  tokenizer = BytesTokenizer()
  cut = tokenizer.encode('犬犬', 7)  # falls inside the second character
  np.testing.assert_array_equal(cut[[0, -1]], [1, 2])
  assert tokenizer.decode(cut) == '犬\ufffd'
  assert tokenizer.decode([1, 300, 3 + 97, 0, 2, 3 + 98]) == 'a'


def test_wordpiece_is_bert_uncased(vocab_file):
  content = pathlib.Path(vocab_file).read_bytes()
  pathlib.Path(vocab_file).write_bytes(b'\xef\xbb\xbf' + content)  # some editors do
  tokenizer = WordPieceTokenizer(vocab_file)
  assert tokenizer.vocab_size == 104 + len(WORDS)
  assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 101, 102)
  ids = tokenizer.encode('A dog, PLAYING Café xylophone', 12)
  assert ids.dtype == np.int32
  expected = [101, *word_ids('a', 'dog', ',', 'play', '##ing', 'cafe'), 100, 102, 0, 0, 0]
  np.testing.assert_array_equal(ids, expected)
  assert tokenizer.decode(ids) == 'a dog, playing cafe [UNK]'


def test_a_caption_cannot_spell_special_tokens(vocab_file):
  tokenizer = WordPieceTokenizer(vocab_file)
  np.testing.assert_array_equal(
    tokenizer.encode('[SEP] dog', 8), [101, *word_ids('[', 'sep', ']', 'dog'), 102, 0, 0]
  )


@pytest.mark.parametrize('length', [2, 3, 5, 8])
def test_truncation_keeps_sep_last(vocab_file, length):
  for tokenizer in (BytesTokenizer(), WordPieceTokenizer(vocab_file)):
    ids = tokenizer.encode('a dog a cat a dog', length)
    full = tokenizer.encode('a dog a cat a dog', 40)
    assert ids.shape == (length,)
    np.testing.assert_array_equal(ids[:-1], full[: length - 1])
    assert ids[-1] == tokenizer.sep_id
  with pytest.raises(ValueError, match='length is 1'):
    tokenizer.encode('a', 1)


def test_decode_stops_at_sep_and_skips_what_stands_for_nothing(vocab_file):
  tokenizer = WordPieceTokenizer(vocab_file)
  ids = [101, 0, *word_ids('cat', '##s'), 9999, 102, *word_ids('dog')]
  assert tokenizer.decode(np.array(ids)) == 'cats'
  assert tokenizer.decode([102, *word_ids('dog')]) == ''


def test_pickle(vocab_file):
  for tokenizer in (BytesTokenizer(), WordPieceTokenizer(vocab_file)):
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode('a dog', 9), tokenizer.encode('a dog', 9))
    assert copy.decode(copy.encode('a dog', 9)) == 'a dog'


@pytest.mark.parametrize(
  'content, reason',
  [
    (None, 'cannot be read'),
    (b'\xff\xfe\x00', 'cannot be read'),
    (b'', r'lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]'),
    (b'[PAD]\n[UNK]\n[CLS]\ndog\n', r'lacks \[SEP\]'),
    (b'dog\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n', r'\[PAD\] has id 1'),
  ],
)
def test_unfit_vocabularies_are_refused(tmp_path, content, reason):
  file = tmp_path / 'vocab.txt'
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(UserError, match=reason) as error:
    WordPieceTokenizer(str(file))
  assert str(file) in str(error.value) and '\n' not in str(error.value)


def test_windows_line_ends(tmp_path):
  file = tmp_path / 'vocab.txt'
  file.write_bytes(b'[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\ndog\r\n')
  np.testing.assert_array_equal(WordPieceTokenizer(str(file)).encode('dog', 3), [2, 4, 3])


def test_make_tokenizer(vocab_file):
  assert isinstance(make_tokenizer('bytes'), BytesTokenizer)
  assert isinstance(make_tokenizer('wordpiece', vocab_file), WordPieceTokenizer)
  for arguments, reason in [
    (('bpe',), "'bpe'; allowed: 'bytes', 'wordpiece'"),
    (('wordpiece',), 'has no vocabulary'),
    (('bytes', vocab_file), 'takes no vocabulary'),
  ]:
    with pytest.raises(UserError, match=reason):
      make_tokenizer(*arguments)
