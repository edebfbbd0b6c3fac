"""Keys: secret, full of entropy, replayed exactly or not at all; and the ledger of releases."""

import json
import os
import pathlib
import shutil
import stat

import jax
import numpy as np
import pytest

from dpcap import privacy

KEYS = 'keys.json'


def open_store(directory, resume_step=0, mark=None, seed=None):
  return privacy.KeyStore(directory, resume_step=resume_step, mark=mark, seed=seed)


def digest(step, variant=0):
  """What step `step` releases, or what it does on a machine that rounds otherwise."""
  return np.array([step, variant, 0, 2**32 - 1], np.uint32)


def run_steps(store, first, last, variant=0):
  """Does steps; returns the marks of the checkpoints after each, by step."""
  marks = {}
  for step in range(first, last):
    store.begin(step)
    assert store.record(step, digest(step, variant))
    marks[step + 1] = store.mark(step + 1)
  return marks


def differ(store, step, mark, variant=1):
  """The first step after a restart comes out in other bits."""
  store.begin(step)
  assert not store.record(step, digest(step, variant))
  store.renew(step, mark)


def mode(path):
  return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize('umask', [0o022, 0o000, 0o077])
def test_only_the_owner_can_read_the_store(tmp_path, umask):
  directory = tmp_path / 'run' / 'secrets'
  previous = os.umask(umask)
  try:
    store = open_store(directory)
    store.begin(0)
  finally:
    os.umask(previous)
  assert mode(directory) == 0o700
  assert mode(directory / KEYS) == 0o600


def test_a_directory_that_was_there_is_closed_to_others(tmp_path):
  tmp_path.chmod(0o755)
  open_store(tmp_path)
  assert mode(tmp_path) == 0o700


def test_every_bit_of_every_key_varies():
  keys = [privacy.Keys.from_entropy() for _ in range(200)]
  for words, bits in (
    (np.array([key.noise for key in keys], np.uint64), 32),
    (np.array([key.sampling for key in keys], np.uint64), 64),
  ):
    assert words.shape == (200, 2)
    ones = (words[..., None] >> np.arange(bits, dtype=np.uint64) & np.uint64(1)).sum(0)
    # Of 200 coins; outside once in 1e13.
    assert ones.min() > 45 and ones.max() < 155
    assert np.all(words >> np.uint64(bits - 1) <= 1)
    assert np.unique(words).size == words.size


def test_two_runs_have_different_keys(tmp_path):
  one, other = open_store(tmp_path / 'a').keys, open_store(tmp_path / 'b').keys
  assert not {*one.noise, *one.sampling} & {*other.noise, *other.sampling}


def test_the_noise_key_uses_all_64_bits():
  draw = lambda noise: jax.random.normal(privacy.Keys(noise, (0, 0)).noise_key(), (8,))
  base = (0x89ABCDEF, 0xFEDCBA98)
  data = jax.random.key_data(privacy.Keys(base, (0, 0)).noise_key())
  np.testing.assert_array_equal(data, np.array(base, np.uint32))
  for word in (0, 1):
    for bit in (0, 15, 31):
      other = list(base)
      other[word] ^= 1 << bit
      assert np.all(draw(base) != draw(tuple(other)))


def test_a_restart_does_the_same_steps_under_the_same_keys(tmp_path):
  store = open_store(tmp_path)
  marks = {0: None} | run_steps(store, 0, 12)
  for resume_step in (10, 10, 12, 3, 0):
    again = open_store(tmp_path, resume_step, marks[resume_step])
    assert again.keys == store.keys and again.renewed is None
    assert (again.started, again.lost_releases, again.releases(20)) == (12, 0, 20)
    run_steps(again, resume_step, 12)
    assert again.releases(20) == 20


@pytest.mark.parametrize('resume_step, lost', [(11, 1), (10, 2), (0, 12)])
def test_a_step_that_comes_out_otherwise_gets_fresh_keys_and_counts_what_is_lost(
  tmp_path, resume_step, lost
):
  store = open_store(tmp_path)
  marks = {0: None} | run_steps(store, 0, 12)
  other = open_store(tmp_path, resume_step, marks[resume_step])
  differ(other, resume_step, marks[resume_step])
  assert not {*store.keys.noise} & {*other.keys.noise}
  assert not {*store.keys.sampling} & {*other.keys.sampling}
  assert other.lost_releases == lost
  assert other.releases(20) == 20 + lost
  # From then on there is nothing to compare with, and all is on disk.
  again = open_store(tmp_path, resume_step, marks[resume_step])
  assert (again.keys, again.lost_releases, again.renewed) == (other.keys, lost, None)
  run_steps(again, resume_step, 12, variant=1)


def test_what_a_step_released_is_on_disk_before_record_returns(tmp_path):
  store = open_store(tmp_path)
  run_steps(store, 0, 2)
  store.begin(2)
  again = open_store(tmp_path)
  assert not again.record(1, digest(1, 1))
  for lane in range(4):
    other = digest(1)
    other[lane] ^= 1
    assert not again.record(1, other)
  assert again.record(1, digest(1))
  # The step that was begun and not recorded never left the process: it may come out anyhow.
  assert again.record(2, digest(2, 1)) and not again.record(2, digest(2))
  assert again.releases(20) == 20


def test_digests_are_readable_by_the_owner_only(tmp_path):
  previous = os.umask(0)
  try:
    run_steps(open_store(tmp_path / 'store'), 0, 2)
  finally:
    os.umask(previous)
  (path,) = (tmp_path / 'store').glob('*.digests')
  assert mode(path) == 0o600


@pytest.mark.parametrize('tail', [b'9', b'9 0123', b'9 ' + b'0' * 32, b'\xff\n', b'\n'])
def test_a_digest_that_a_crash_cut_off_is_as_if_it_had_not_been_written(tmp_path, tail):
  marks = run_steps(open_store(tmp_path), 0, 9)
  (path,) = tmp_path.glob('*.digests')
  with path.open('ab') as file:
    file.write(tail)
  store = open_store(tmp_path, 9, marks[9])
  assert store.renewed is None
  run_steps(store, 9, 12)
  store = open_store(tmp_path, 9, store.mark(9))
  assert store.renewed is None
  assert not store.record(9, digest(9, 1)) and store.record(11, digest(11))


def test_a_record_that_could_not_be_written_is_not_taken_for_done(tmp_path, monkeypatch):
  store = open_store(tmp_path)
  run_steps(store, 0, 3)
  store.begin(3)

  def fail(*_):
    raise OSError('no space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='no space'):
      store.record(3, digest(3))
  assert store.record(3, digest(3, 1))
  run_steps(store, 4, 6)
  again = open_store(tmp_path)
  run_steps(again, 0, 3)
  assert again.record(3, digest(3, 1)) and again.record(5, digest(5))


@pytest.mark.parametrize(
  'damage',
  [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(path.read_bytes().replace(b'\n5 ', b'\n?5 ')),
    lambda path: path.write_bytes(b''.join(path.read_bytes().splitlines(True)[:-2])),
  ],
)
@pytest.mark.parametrize('resume_step', [4, 10])
def test_steps_that_cannot_be_compared_are_lost(tmp_path, damage, resume_step):
  marks = run_steps(open_store(tmp_path), 0, 12)
  (path,) = tmp_path.glob('*.digests')
  damage(path)
  store = open_store(tmp_path, resume_step, marks[resume_step])
  assert 'does not say what every step released' in store.renewed
  assert store.releases(20) == 20 + 12 - resume_step
  again = open_store(tmp_path, resume_step, marks[resume_step])
  assert again.keys == store.keys and again.renewed is None


def test_digests_that_are_gone_are_missed_after_one_step(tmp_path):
  """A step that was begun last may lack its digest, but an era never lacks their file."""
  marks = run_steps(open_store(tmp_path), 0, 1)
  next(tmp_path.glob('*.digests')).unlink()
  store = open_store(tmp_path)
  assert store.renewed and store.releases(20) == 21
  assert marks[1]['era'] != run_steps(store, 0, 1)[1]['era']


def test_steps_that_were_recorded_were_started(tmp_path):
  """The keys' file is brought back from before, the digests' is not."""
  store = open_store(tmp_path)
  run_steps(store, 0, 5)
  old = (tmp_path / KEYS).read_text()
  run_steps(store, 5, 9)
  (tmp_path / KEYS).write_text(old)
  store = open_store(tmp_path, 5, store.mark(5))
  assert store.started == 9
  differ(store, 5, store.mark(5))
  assert store.releases(20) == 24


def test_keys_from_before_the_last_ones_are_refused(tmp_path):
  store = open_store(tmp_path)
  marks = run_steps(store, 0, 5)
  old = (tmp_path / KEYS).read_text()
  differ(store, 4, marks[4])
  run_steps(store, 4, 6)
  (tmp_path / KEYS).write_text(old)
  with pytest.raises(ValueError, match='does not know the keys under which .* was written; bring'):
    open_store(tmp_path, 4, marks[4])
  (tmp_path / KEYS).unlink()
  with pytest.raises(ValueError, match='remove the directory to start a new run'):
    open_store(tmp_path)


def copy_of(directory, name):
  return pathlib.Path(shutil.copytree(directory, directory.with_name(name)))


def test_a_checkpoint_of_a_copy_that_went_on_under_fresh_keys_is_refused(tmp_path):
  """Its parameters would meet this run's noise for other ones a second time."""
  here = tmp_path / 'here'
  store = open_store(here)
  marks = run_steps(store, 0, 5)
  copy = open_store(copy_of(here, 'copy'), 4, marks[4])
  differ(copy, 4, marks[4])
  marks_of_copy = run_steps(copy, 4, 12)
  run_steps(store, 5, 12)
  before = (here / KEYS).read_text()
  for step in (5, 8, 12):
    with pytest.raises(ValueError, match=f'at step {step} was made under the keys of another run'):
      open_store(here, step, marks_of_copy[step])
  assert (here / KEYS).read_text() == before
  # What both have in common is both's.
  assert open_store(here, 4, marks[4]).releases(20) == 20
  # And the copy does not take what the run did without it.
  with pytest.raises(ValueError, match='which went on from step 4 under others'):
    open_store(tmp_path / 'copy', 12, store.mark(12))


def test_a_checkpoint_of_a_copy_that_went_on_under_the_same_keys_is_refused(tmp_path):
  here = tmp_path / 'here'
  store = open_store(here)
  run_steps(store, 0, 5)
  copy = open_store(copy_of(here, 'copy'))
  marks_of_copy = run_steps(copy, 5, 9, variant=1)
  run_steps(store, 5, 12)
  with pytest.raises(ValueError, match='not what this run computed but a copy of it'):
    open_store(here, 8, marks_of_copy[8])
  with pytest.raises(ValueError, match='knows of 9 steps, but .* checkpoint at step 12'):
    open_store(tmp_path / 'copy', 12, store.mark(12))


@pytest.mark.parametrize('mark', [None, {}, {'era': 'x'}])
def test_a_checkpoint_that_does_not_say_whose_it_is_is_refused(tmp_path, mark):
  run_steps(open_store(tmp_path), 0, 5)
  with pytest.raises(ValueError, match='at step 4 does not say under which keys .* new workdir'):
    open_store(tmp_path, 4, mark)


def test_losses_of_several_restarts_add_up(tmp_path):
  marks = run_steps(open_store(tmp_path), 0, 12)
  for variant, (end, lost) in enumerate([(15, 2), (11, 7), (12, 8)], 1):
    store = open_store(tmp_path, 10, marks[10])
    differ(store, 10, marks[10], variant)
    run_steps(store, 10, end, variant)
    assert store.lost_releases == lost


def test_an_older_checkpoint_of_its_own_counts_and_gets_fresh_keys(tmp_path):
  # Step 3 was never computed with the second keys: at step 5, with other parameters, their
  # noise would come a second time.
  marks = run_steps(open_store(tmp_path), 0, 10)
  second = open_store(tmp_path, 5, marks[5])
  differ(second, 5, marks[5])
  run_steps(second, 5, 8)
  for resume_step in (3, 0):
    directory = copy_of(tmp_path, f'{tmp_path.name}-{resume_step}')
    third = open_store(directory, resume_step, marks.get(resume_step))
    assert third.keys != second.keys and third.renewed
    # 10 by the first keys, 3 by the second, the rest to come.
    assert third.releases(20) == 13 + 20 - resume_step
    again = open_store(directory, resume_step, marks.get(resume_step))
    assert again.keys == third.keys and again.renewed is None
  # The first keys went no further with this run than to step 5.
  with pytest.raises(ValueError, match='which went on from step 5 under others'):
    open_store(tmp_path, 6, marks[6])


def test_two_ways_to_the_same_step_are_told_apart(tmp_path):
  """The third keys went on from the second ones' step 6; the first ones' is elsewhere."""
  first = run_steps(open_store(tmp_path), 0, 10)
  store = open_store(tmp_path, 3, first[3])
  differ(store, 3, first[3])
  second = run_steps(store, 3, 8)
  differ(store, 6, second[6])
  run_steps(store, 6, 7, variant=1)
  assert open_store(tmp_path, 6, second[6]).renewed is None
  with pytest.raises(ValueError, match='which went on from step 3'):
    open_store(tmp_path, 6, first[6])


def test_the_start_of_an_era_is_a_checkpoint_and_not_a_step(tmp_path):
  """The keys in force went on from step 6 of the third ones; step 6 of the first has others'."""
  first = run_steps(open_store(tmp_path), 0, 10)
  differ(open_store(tmp_path, 8, first[8]), 8, first[8])
  store = open_store(tmp_path, 4, first[4])
  third = run_steps(store, 4, 7, variant=1)
  differ(store, 6, third[6], variant=2)
  assert open_store(tmp_path, 6, third[6]).keys == store.keys
  assert open_store(tmp_path, 6, first[6]).keys != store.keys


def test_a_started_step_is_on_disk_before_begin_returns(tmp_path):
  store = open_store(tmp_path)
  for step in range(3):
    store.begin(step)
    assert json.loads((tmp_path / KEYS).read_text())['started'] == step + 1


def test_beginning_a_step_again_counts_once(tmp_path):
  marks = run_steps(open_store(tmp_path), 0, 12)
  for _ in range(2):
    run_steps(open_store(tmp_path, 5, marks[5]), 5, 9)  # done again, stopped early
  store = open_store(tmp_path, 5, marks[5])
  differ(store, 5, marks[5])
  assert store.lost_releases == 7


def test_resuming_without_the_store_is_refused_with_its_path(tmp_path):
  with pytest.raises(ValueError, match=f'{tmp_path / KEYS}: not found.*checkpoint at step 7'):
    open_store(tmp_path, resume_step=7)
  assert not (tmp_path / KEYS).exists()


@pytest.mark.parametrize(
  'damage',
  [
    '',
    '{"noise": [1, 2], "samp',
    '[]',
    'null',
    '{}',
    '{"noise": 3, "sampling": [1, 2], "eras": [], "started": 0, "lost_releases": 0}',
    '{"noise": [1, 2], "sampling": [1, 2], "plan": null, "seeded": false, "eras": [],'
    ' "started": 0, "lost_releases": 0}',
  ],
)
@pytest.mark.parametrize('resume_step', [0, 7])
def test_a_damaged_store_is_refused_with_its_path_and_left_alone(tmp_path, damage, resume_step):
  (tmp_path / KEYS).write_text(damage)
  with pytest.raises(ValueError, match=f'{tmp_path / KEYS}: damaged'):
    open_store(tmp_path, resume_step)
  assert (tmp_path / KEYS).read_text() == damage


def test_a_damaged_store_that_is_not_text_is_refused(tmp_path):
  (tmp_path / KEYS).write_bytes(b'\xff\xfe\x00')
  with pytest.raises(ValueError, match='damaged'):
    open_store(tmp_path)


def test_a_crash_in_the_middle_of_a_write_leaves_the_store_readable(tmp_path, monkeypatch):
  store = open_store(tmp_path)
  marks = run_steps(store, 0, 4)
  before = (tmp_path / KEYS).read_text()

  def crash(*args):
    raise KeyboardInterrupt

  for step, function in enumerate(('fsync', 'replace'), 4):
    with monkeypatch.context() as patch:
      patch.setattr(os, function, crash)
      with pytest.raises(KeyboardInterrupt):
        store.begin(step)
    assert (tmp_path / KEYS).read_text() == before
  for leftover in tmp_path.iterdir():
    if leftover.suffix == '.tmp':
      leftover.write_text('{"noi')
      leftover.chmod(0o666)
  again = open_store(tmp_path, 4, marks[4])
  assert again.keys == store.keys
  run_steps(again, 4, 6)
  assert json.loads((tmp_path / KEYS).read_text())['started'] == 6
  assert mode(tmp_path / KEYS) == 0o600


def test_a_begin_that_could_not_be_written_is_not_taken_for_done(tmp_path, monkeypatch):
  store = open_store(tmp_path)

  def fail(*args):
    raise OSError('no space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='no space'):
      store.begin(0)
  store.begin(0)
  assert json.loads((tmp_path / KEYS).read_text())['started'] == 1


def test_a_seed_gives_keys_that_anybody_can_compute(tmp_path):
  one, other = (open_store(tmp_path / name, seed=3).keys for name in 'ab')
  assert one == other == privacy.Keys.from_seed(3)
  assert one != open_store(tmp_path / 'c', seed=4).keys
  words = [*one.noise, *one.sampling]
  assert len(set(words)) == 4
  assert max(one.noise) < 2**32 and max(one.sampling) < 2**64
  one.noise_key()


def test_a_seeded_run_does_not_repeat_noise_under_other_keys(tmp_path):
  store = open_store(tmp_path, seed=3)
  marks, seen = run_steps(store, 0, 12), {store.keys.noise}
  for variant in (1, 2, 3):
    store = open_store(tmp_path, 10, marks[10], seed=3)
    differ(store, 10, marks[10], variant)
    assert store.keys.noise not in seen
    seen.add(store.keys.noise)
    run_steps(store, 10, 12, variant)


def test_a_seeded_run_does_not_go_on_as_if_its_keys_were_secret(tmp_path):
  marks = run_steps(open_store(tmp_path, seed=3), 0, 12)
  with pytest.raises(ValueError, match='seed'):
    open_store(tmp_path, 12, marks[12])


def test_the_name_of_an_era_is_random_and_says_nothing_of_its_keys(tmp_path):
  marks = [run_steps(open_store(tmp_path / name, seed=3), 0, 1)[1] for name in 'abc']
  assert len({mark['era'] for mark in marks}) == 3


def test_keys_do_not_reach_a_log_by_printing_what_holds_them(tmp_path):
  store = open_store(tmp_path)
  plan = privacy.PrivacyPlan(1000, 100, 50, 1e-5, 1.0, 1.5)
  text = f'{store!r} {store.keys!r} {plan.make_sampler(store.keys.sampling)!r}'
  for word in (*store.keys.noise, *store.keys.sampling):
    assert str(word) not in text
