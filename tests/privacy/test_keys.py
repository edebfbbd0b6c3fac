"""Keys: secret, full of entropy, replayed exactly or not at all; and the ledger of releases."""

import json
import os
import stat

import jax
import numpy as np
import pytest

from dpcap import privacy

KEYS = 'keys.json'


def open_store(directory, resume_step=0, environment='8 devices, jax 0.10', seed=None):
  return privacy.KeyStore(directory, resume_step=resume_step, environment=environment, seed=seed)


def run_steps(store, first, last):
  for step in range(first, last):
    store.begin(step)


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


def test_a_restart_in_the_same_environment_replays(tmp_path):
  store = open_store(tmp_path)
  run_steps(store, 0, 12)
  for resume_step in (10, 10, 12, 0):
    again = open_store(tmp_path, resume_step)
    assert again.keys == store.keys
    assert again.lost_releases == 0
    assert again.releases(20) == 20


@pytest.mark.parametrize('resume_step, lost', [(12, 0), (10, 2), (0, 12)])
def test_a_restart_in_another_environment_gets_fresh_keys_and_counts_what_it_lost(
  tmp_path, resume_step, lost
):
  store = open_store(tmp_path)
  run_steps(store, 0, 12)
  other = open_store(tmp_path, resume_step, environment='4 devices')
  assert not {*store.keys.noise} & {*other.keys.noise}
  assert not {*store.keys.sampling} & {*other.keys.sampling}
  assert other.lost_releases == lost
  assert other.releases(20) == 20 + lost
  # And from then on the new environment replays.
  again = open_store(tmp_path, resume_step, environment='4 devices')
  assert (again.keys, again.lost_releases) == (other.keys, lost)


def test_losses_of_several_restarts_add_up(tmp_path):
  run_steps(open_store(tmp_path), 0, 12)
  run_steps(open_store(tmp_path, 10, environment='b'), 10, 15)  # 2 lost
  run_steps(open_store(tmp_path, 10, environment='c'), 10, 11)  # 5 more
  back = open_store(tmp_path, 10)  # the first environment, but its keys are gone: 1 more
  assert back.lost_releases == 8


def test_a_restart_from_before_the_keys_in_force_counts_and_gets_fresh_keys(tmp_path):
  # Steps 3 and 4 were never computed with the second keys; with other parameters at
  # step 5 its noise would come a second time under another gradient.
  run_steps(open_store(tmp_path), 0, 10)
  second = open_store(tmp_path, 5, environment='b')
  run_steps(second, 5, 8)
  third = open_store(tmp_path, 3, environment='b')
  assert third.keys != second.keys
  # 10 by the first keys, 3 by the second, 17 to come.
  assert third.releases(20) == 30


def test_a_started_step_is_on_disk_before_begin_returns(tmp_path):
  store = open_store(tmp_path)
  for step in range(3):
    store.begin(step)
    assert json.loads((tmp_path / KEYS).read_text())['started'] == step + 1


def test_beginning_a_step_again_counts_once(tmp_path):
  run_steps(open_store(tmp_path), 0, 12)
  run_steps(open_store(tmp_path, 5), 5, 9)  # a replay, stopped early
  run_steps(open_store(tmp_path, 5), 5, 9)
  assert open_store(tmp_path, 5, environment='other').lost_releases == 7


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
    '{"noise": 3, "sampling": [1, 2], "environment": "", "started": 0, "lost_releases": 0}',
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
  run_steps(store, 0, 4)
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
    if leftover.name != KEYS:
      leftover.write_text('{"noi')
  again = open_store(tmp_path, 4)
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


def test_a_seeded_run_does_not_repeat_noise_in_another_environment(tmp_path):
  seen = set()
  run_steps(open_store(tmp_path, seed=3), 0, 12)
  seen.add(open_store(tmp_path, 12, seed=3).keys.noise)
  for environment in 'bcd':
    store = open_store(tmp_path, 10, environment, seed=3)
    assert store.keys.noise not in seen
    seen.add(store.keys.noise)
    run_steps(store, 10, 12)


def test_a_seeded_run_does_not_go_on_as_if_its_keys_were_secret(tmp_path):
  run_steps(open_store(tmp_path, seed=3), 0, 12)
  with pytest.raises(ValueError, match='seed'):
    open_store(tmp_path, 12)


def test_keys_do_not_reach_a_log_by_printing_what_holds_them(tmp_path):
  store = open_store(tmp_path)
  plan = privacy.PrivacyPlan(1000, 100, 50, 1e-5, 1.0, 1.5)
  text = f'{store!r} {store.keys!r} {plan.make_sampler(store.keys.sampling)!r}'
  for word in (*store.keys.noise, *store.keys.sampling):
    assert str(word) not in text
