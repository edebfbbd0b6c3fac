"""Groups of records: what is drawn of them, and that no record is in two."""

import fsspec
import numpy as np
import pytest

from dpcap.data import groups as groups_lib

# 0 and 4 are near duplicates, and 1, 2 and 5.
FIRSTS = np.array([0, 1, 1, 3, 0, 1])


def test_a_group_gives_one_of_its_records_each_alike(tmp_path):
  groups = groups_lib.write(str(tmp_path / 'all.json'), FIRSTS, 'all')
  groups_lib.check(groups)
  assert (groups.count, groups.records) == (3, 6)
  assert [groups.record(group) for group in range(3)] == [0, 1, 3]
  drawn = [groups.record(1, np.random.default_rng(i)) for i in range(3000)]
  counts = np.bincount(drawn, minlength=6)
  assert set(np.flatnonzero(counts)) == {1, 2, 5} and counts[[1, 2, 5]].min() > 900
  assert {groups.record(0, np.random.default_rng(i)) for i in range(30)} == {0, 4}
  assert drawn[:9] == [groups.record(1, np.random.default_rng(i)) for i in range(9)]


def test_nothing_is_drawn_where_there_is_no_choice(tmp_path):
  """Or the crops of a record would be others once some other record has a duplicate."""
  groups = groups_lib.write(str(tmp_path / 'all.json'), FIRSTS, 'all')
  kept = groups_lib.write(str(tmp_path / 'one.json'), FIRSTS, 'one')
  for of, group in ((groups, 2), *((kept, group) for group in range(3))):
    one, other = np.random.default_rng(1), np.random.default_rng(1)
    assert of.record(group, one) == of.record(group) and one.random() == other.random()


def test_of_those_that_are_kept_each_is_one(tmp_path):
  groups = groups_lib.write(str(tmp_path / 'one.json'), FIRSTS, 'one')
  groups_lib.check(groups)
  assert (groups.count, groups.records) == (3, 6)
  drawn = [groups.record(g, np.random.default_rng(g)) for g in range(3) for _ in range(20)]
  assert sorted(set(drawn)) == [0, 1, 3]


def test_words_of_the_statement(tmp_path):
  groups = groups_lib.write(str(tmp_path / 'all.json'), FIRSTS, 'all')
  assert groups.unit('image') == 'group of near-duplicate images'
  kept = groups._replace(keep='one')
  assert kept.unit('image') == 'image' and 'not in N' in kept.not_covered
  assert 'and so how many' in kept.not_covered
  assert 'and so N: ' in groups.not_covered and 'can join two' in groups.not_covered


def test_a_file_that_is_not_as_written_is_refused(tmp_path):
  groups = groups_lib.write(str(tmp_path / 'all.json'), FIRSTS, 'all')

  def refused(array, reason, **changed):
    file = tmp_path / 'x.npy'
    np.save(file, np.array(array, np.uint32))
    digest = groups_lib._digest(file.read_bytes())
    named = file.rename(tmp_path / f'x.{digest}.npy')
    groups_lib._load.cache_clear()
    with pytest.raises(ValueError, match=reason):
      groups_lib.check(groups._replace(file=str(named), **changed))

  refused([0, 2, 3, 4, 0, 1, 2, 1], 'a record twice')
  refused([0, 2, 3, 4, 0, 1, 2, 6], 'records after 6')
  refused([0, 2, 2, 4, 0, 1, 2, 3], 'other groups than 3')
  refused([0, 2, 3, 5, 0, 1, 2, 3], 'other groups than 3')
  refused([0, 2, 3, 4, 0, 1, 2, 3], "keep is 'all', but .* was not written so")
  for keep, other in (('all', 'one'), ('one', 'all')):
    written = groups_lib.write(str(tmp_path / f'{keep}.json'), FIRSTS, keep)
    with pytest.raises(ValueError, match=f"keep is '{other}', but"):
      groups_lib.check(written._replace(keep=other))
  with open(groups.file, 'ab') as file:
    file.write(b'x')
  with pytest.raises(ValueError, match='changed after it was written'):
    groups_lib.check(groups)


def test_groups_in_a_store(tmp_path):
  store = fsspec.filesystem('memory')
  try:
    groups = groups_lib.write('memory://groups/all.json', FIRSTS, 'all')
    groups_lib.check(groups)
    assert groups.record(2) == 3
  finally:
    store.rm('/groups', recursive=True)


@pytest.mark.parametrize('firsts', [[1, 1], [0, 0, 1]])
def test_firsts_that_are_none(tmp_path, firsts):
  with pytest.raises(ValueError, match='the first of each group'):
    groups_lib.write(str(tmp_path / 'all.json'), np.array(firsts), 'all')
