"""Draws: Poisson as the accountant assumes, seekable, the same on any number of hosts."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats

from dpcap.privacy import SAMPLERS, sampling

SHARDS = range(sampling.VIRTUAL_SHARDS)
# How often a right program fails one of these comparisons.
UNLIKELY = 1e-12


def make_key(rng):
  return tuple(int(word) for word in rng.integers(2**64, size=2, dtype=np.uint64))


def make_poisson(rng, size, batch):
  return SAMPLERS['poisson'](size, batch, make_key(rng))


class Inclusions(NamedTuple):
  """Who was drawn: drawn[step, index], by a sampler with this key and probability q."""

  drawn: np.ndarray
  q: float
  key: tuple[int, int]


SMALL_N, SMALL_SHARDS, SMALL_STEPS = 42, 8, 8000


@pytest.fixture(scope='module', params=[2, 11, 25, 42], ids='batch{}'.format)
def inclusions(request):
  """Many draws of a small data set in eight virtual shards of five or six examples."""
  sampler = make_poisson(np.random.default_rng(), SMALL_N, request.param)
  drawn = np.zeros((SMALL_STEPS, SMALL_N), bool)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, 'VIRTUAL_SHARDS', SMALL_SHARDS)
    for step in range(SMALL_STEPS):
      drawn[step, sampler.draw(step, range(SMALL_SHARDS))] = True
  return Inclusions(drawn, request.param / SMALL_N, sampler.key)


def assert_frequency(hits, trials, q, key):
  """Hits (array or number) are binomial(trials, q)."""
  hits = np.asarray(hits)
  tails = scipy.stats.binom.cdf(hits, trials, q), scipy.stats.binom.sf(hits - 1, trials, q)
  assert np.min(tails) > UNLIKELY, f'key {key}'


def assert_multinomial(counts, probabilities, key):
  """Chi-square, rare cells merged until each is expected a hundred times or more."""
  order = np.argsort(probabilities)
  expected, counts = np.asarray(probabilities)[order] * np.sum(counts), np.asarray(counts)[order]
  assert not counts[expected == 0].any(), f'key {key}'
  starts, filled = [0], 0.0
  for i, cell in enumerate(expected[:-1], 1):
    filled += cell
    if filled >= 100 and expected[i:].sum() >= 100:
      starts, filled = [*starts, i], 0.0
  expected, counts = np.add.reduceat(expected, starts), np.add.reduceat(counts, starts)
  statistic = np.sum((counts - expected) ** 2 / expected)
  assert scipy.stats.chi2.sf(statistic, max(1, len(counts) - 1)) > UNLIKELY, f'key {key}'


def test_every_example_is_drawn_with_probability_q(inclusions):
  drawn, q, key = inclusions
  assert_frequency(drawn.sum(0), SMALL_STEPS, q, key)
  assert_frequency(drawn.sum(), SMALL_STEPS * SMALL_N, q, key)
  # At the borders of virtual shards, pooled.
  starts = np.array([shard * SMALL_N // SMALL_SHARDS for shard in range(SMALL_SHARDS)])
  assert_frequency(drawn[:, starts].sum(), SMALL_STEPS * SMALL_SHARDS, q, key)
  assert_frequency(drawn[:, starts - 1].sum(), SMALL_STEPS * SMALL_SHARDS, q, key)


def test_the_batch_size_is_binomial(inclusions):
  drawn, q, key = inclusions
  sizes = np.bincount(drawn.sum(1), minlength=SMALL_N + 1)
  assert_multinomial(sizes, scipy.stats.binom.pmf(np.arange(SMALL_N + 1), SMALL_N, q), key)


def test_examples_are_drawn_independently_of_each_other(inclusions):
  drawn, q, key = inclusions
  together = drawn.T.astype(np.float64) @ drawn
  others = ~np.eye(SMALL_N, dtype=bool)
  assert_frequency(together[others], SMALL_STEPS, q * q, key)


def test_runs_of_examples_are_drawn_as_by_one_coin_each(inclusions):
  drawn, q, key = inclusions
  # All 256 patterns of eight neighbours, wherever virtual shards begin.
  for first in range(0, SMALL_N - 8 + 1, 5):
    patterns = drawn[:, first : first + 8] @ (1 << np.arange(8))
    heads = np.array([bin(pattern).count('1') for pattern in range(256)])
    counts = np.bincount(patterns, minlength=256)
    assert_multinomial(counts, q**heads * (1 - q) ** (8 - heads), key)


def test_steps_are_drawn_independently_of_each_other(inclusions):
  drawn, q, key = inclusions
  for lag in (1, 2):
    trials = SMALL_STEPS // (2 * lag) * lag  # pairs that share no draw
    pairs = drawn[: 2 * trials].reshape(-1, 2, lag, SMALL_N)
    both = pairs[:, 0] & pairs[:, 1]
    assert_frequency(both.sum((0, 1)), trials, q * q, key)
    assert_frequency(both.sum(), trials * SMALL_N, q * q, key)
    # Shifted by one, also across the border of a virtual shard.
    shifted = pairs[:, 0, :, 1:] & pairs[:, 1, :, :-1]
    assert_frequency(shifted.sum(), trials * (SMALL_N - 1), q * q, key)


@pytest.mark.parametrize(
  'size, batch',
  [(1, 1), (10, 5), (1023, 100), (1024, 1024), (1025, 3), (5000, 2000), (3_000_000, 2)],
)
def test_indices_are_ascending_unique_and_in_range(rng, size, batch):
  sampler = make_poisson(rng, size, batch)
  for step in (0, 1, 10**6):
    drawn = sampler.draw(step)
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    assert np.all((drawn >= 0) & (drawn < size))


def test_the_batch_size_and_the_spread_are_right_at_the_size_of_the_main_run(rng):
  size, batch = 233_804_767, 1_310_720
  sampler = make_poisson(rng, size, batch)
  drawn = sampler.draw(5707)
  assert_frequency(len(drawn), size, batch / size, sampler.key)
  per_shard = np.bincount(drawn * 128 // size, minlength=128)
  assert_frequency(per_shard, size // 128, batch / size, sampler.key)
  gaps = np.diff(drawn)
  bins = np.minimum(gaps // 50, 30)
  q = batch / size
  tail = (1 - q) ** (50.0 * np.arange(31) - (np.arange(31) > 0))
  assert_multinomial(np.bincount(bins, minlength=31), tail - np.append(tail[1:], 0), sampler.key)


def test_small_data_in_all_virtual_shards_is_drawn_with_probability_q(rng):
  sampler, steps = make_poisson(rng, 10, 4), 300
  counts = np.bincount(np.concatenate([sampler.draw(s) for s in range(steps)]), minlength=10)
  assert_frequency(counts, steps, 0.4, sampler.key)
  assert_frequency(counts.sum(), steps * 10, 0.4, sampler.key)


def test_a_shard_is_drawn_to_its_end_however_short_the_gaps(monkeypatch):
  class Shortest:
    """All gaps 1: as unlikely as can be, and possible."""

    def geometric(self, q, count):
      del q
      return np.ones(count, np.int64)

  monkeypatch.setattr(sampling, '_generator', lambda *args: Shortest())
  sampler = SAMPLERS['poisson'](200_000, 50, (0, 0))
  np.testing.assert_array_equal(sampler.draw(0), np.arange(200_000))


@pytest.mark.parametrize('size', [1, 9, 1024, 2500])
def test_probability_one_draws_everything(rng, size):
  np.testing.assert_array_equal(make_poisson(rng, size, size).draw(3), np.arange(size))


def test_a_draw_is_a_function_of_key_and_step(rng):
  key = make_key(rng)
  sampler, other = (SAMPLERS['poisson'](3000, 900, key) for _ in range(2))
  history = [sampler.draw(step) for step in range(6)]
  np.testing.assert_array_equal(other.draw(5), history[5])  # without the draws before
  np.testing.assert_array_equal(sampler.draw(np.int64(2)), history[2])
  for one, two in itertools.combinations(history, 2):
    assert not np.array_equal(one, two)


@pytest.mark.parametrize('word', [0, 1])
@pytest.mark.parametrize('bit', [0, 31, 32, 63])
def test_every_part_of_the_key_counts(rng, word, bit):
  key = list(make_key(rng))
  one = SAMPLERS['poisson'](3000, 900, tuple(key)).draw(0)
  key[word] ^= 1 << bit
  assert not np.array_equal(one, SAMPLERS['poisson'](3000, 900, tuple(key)).draw(0))


@pytest.mark.parametrize('size, batch', [(40, 20), (5000, 700)])
def test_hosts_that_share_out_the_virtual_shards_draw_the_one_batch(rng, size, batch):
  sampler = make_poisson(rng, size, batch)
  host = rng.integers(3, size=len(SHARDS))
  parts = [sampler.draw(4, np.flatnonzero(host == h)) for h in range(3)]
  whole = sampler.draw(4)
  assert sum(map(len, parts)) == len(whole)
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), whole)
  assert sampler.draw(4, []).size == 0
  assert sampler.draw(4, []).dtype == np.int64


@pytest.mark.parametrize('size, batch', [(60, 20), (61, 20), (7, 7), (5, 1)])
def test_an_epoch_of_shuffled_batches_repeats_nothing(rng, size, batch):
  sampler = SAMPLERS['shuffle'](size, batch, make_key(rng))
  per_epoch = size // batch
  for epoch in range(3):
    drawn = [sampler.draw(step) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
    assert all(len(indices) == batch and np.all(np.diff(indices) > 0) for indices in drawn)
    everything = np.concatenate(drawn)
    assert np.unique(everything).size == everything.size == per_epoch * batch
    assert everything.min() >= 0 and everything.max() < size


def test_shuffled_epochs_differ_and_are_a_function_of_key_and_step(rng):
  key = make_key(rng)
  sampler = SAMPLERS['shuffle'](600, 200, key)
  batches = [sampler.draw(step) for step in range(9)]
  for one, other in itertools.combinations(batches, 2):
    assert not np.array_equal(one, other)
  np.testing.assert_array_equal(SAMPLERS['shuffle'](600, 200, key).draw(7), batches[7])
  assert not np.array_equal(SAMPLERS['shuffle'](600, 200, make_key(rng)).draw(7), batches[7])


def test_the_streams_of_draws_shuffles_and_augmentations_never_meet(rng, monkeypatch):
  key, streams = make_key(rng), []
  make = sampling._generator

  def spy(*args):
    generator = make(*args)
    streams.append(tuple(generator.bit_generator.state['state']['counter']))
    return generator

  monkeypatch.setattr(sampling, '_generator', spy)
  for step in range(4):
    SAMPLERS['poisson'](2000, 100, key).draw(step)
    SAMPLERS['shuffle'](50, 50, key).draw(step)
    for index in range(1100):
      sampling.augmentation_generator(key, step, index)
  assert len(streams) == 4 * (len(SHARDS) + 1 + 1100)
  # The lowest word counts the numbers of one stream; the rest must name it.
  assert {counter[0] for counter in streams} == {0}
  assert len({counter[1:] for counter in streams}) == len(streams)


def test_augmentations_are_replayable_and_differ_between_steps_and_examples(rng):
  key = make_key(rng)
  numbers = {
    (step, index): tuple(sampling.augmentation_generator(key, step, index).random(3))
    for step in range(5)
    for index in range(5)
  }
  assert len(set(numbers.values())) == 25
  again = sampling.augmentation_generator(key, 2, 3).random(3)
  np.testing.assert_array_equal(again, numbers[2, 3])


def make_truncated(rng, size, batch, most):
  return SAMPLERS['truncated_poisson'](size, batch, make_key(rng), most)


@pytest.fixture(name='few_shards')
def _few_shards(monkeypatch):
  monkeypatch.setattr(sampling, 'VIRTUAL_SHARDS', 3)
  monkeypatch.setattr(sampling.PoissonSampler.draw, '__defaults__', (range(3),))


def test_truncation_only_ever_drops_the_surplus(rng, few_shards):
  sampler = make_truncated(rng, 300, 60, 63)
  whole = SAMPLERS['poisson'](300, 60, sampler.key)
  sizes = []
  for step in range(400):
    drawn, everything = sampler.draw(step), whole.draw(step)
    assert drawn.dtype == np.int64 and np.all(np.diff(drawn) > 0)
    assert np.isin(drawn, everything).all()
    assert len(drawn) == min(len(everything), 63)
    sizes.append(len(everything))
    np.testing.assert_array_equal(sampler.draw(step), drawn)
  assert min(sizes) < 63 < max(sizes)


def test_whom_truncation_drops_is_uniform(rng, few_shards):
  size, batch, most, steps = 12, 6, 5, 20_000
  sampler = make_truncated(rng, size, batch, most)
  drawn = np.zeros((steps, size), bool)
  for step in range(steps):
    drawn[step, sampler.draw(step)] = True
  sizes, q = np.arange(size + 1), batch / size
  kept = np.minimum(sizes, most)
  chances = scipy.stats.binom.pmf(sizes, size, q)
  assert_frequency(drawn.sum(0), steps, np.sum(chances * kept) / size, sampler.key)
  together = drawn.T.astype(np.float64) @ drawn
  pairs = np.sum(chances * kept * (kept - 1)) / (size * (size - 1))
  assert_frequency(together[~np.eye(size, dtype=bool)], steps, pairs, sampler.key)
  # All subsets of the largest size are equally likely.
  full = drawn[drawn.sum(1) == most] @ (1 << np.arange(size))
  counts = np.unique(full, return_counts=True)[1]
  assert len(counts) == 792
  assert scipy.stats.chisquare(counts).pvalue > UNLIKELY


def test_truncation_keeps_to_its_own_stream(rng, few_shards):
  """What is dropped in one step says nothing of the next, nor of another draw."""
  sampler = make_truncated(rng, 50, 50, 25)
  drops = [tuple(sampler.draw(step)) for step in range(200)]
  assert len(set(drops)) == 200
