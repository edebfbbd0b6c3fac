"""Drawing the examples of a step: the random choice that amplifies privacy.

Draws are counter-based (Philox; Salmon et al. 2011): a draw is a function of the
128-bit sampling key and the step, so any step can be drawn without the ones before.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

# The data is cut into this many virtual shards, each drawn from a counter of its own,
# so that hosts that hold different shards draw their parts of one and the same batch.
# A constant: another number would be another draw.
VIRTUAL_SHARDS = 1024

# First word of the counter's domain: keeps streams under one key from ever meeting.
_POISSON, _SHUFFLE, _AUGMENT, _TRUNCATE = 1, 2, 3, 4


def _generator(key: tuple[int, int], domain: int, a: int, b: int) -> np.random.Generator:
  # The lowest word counts the numbers drawn; the rest names the stream.
  counter = np.array([0, domain, a, b], np.uint64)
  return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=counter))


def augmentation_generator(key: tuple[int, int], step: int, index: int) -> np.random.Generator:
  """Randomness for augmenting example `index` in `step`: its own stream, replayable."""
  return _generator(key, _AUGMENT, index, step)


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
  """Each example in each step independently with probability q.

  Formal guarantee: `draw(0), draw(1), ...` are independent Poisson samples, as
  `dp_accounting.PoissonSampledDpEvent(q, ...)` assumes, up to the quality of Philox
  as a source of randomness and the 53-bit resolution of a float64.

  Attributes:
    dataset_size: N, fixed and public.
    expected_batch_size: q N.
    key: two 64-bit words, secret.
  """

  dataset_size: int
  expected_batch_size: int
  key: tuple[int, int] = dataclasses.field(repr=False)

  @property
  def sampling_probability(self) -> float:
    """q, the chance of each example in each step."""
    return self.expected_batch_size / self.dataset_size

  def draw(self, step: int, shards: Iterable[int] = range(VIRTUAL_SHARDS)) -> np.ndarray:
    """Indices drawn at `step` within the given virtual shards, ascending int64.

    The time is that of the expected number of draws, not of dataset_size: gaps
    between successes of independent trials are geometric.
    """
    parts = [self._draw_shard(step, shard) for shard in shards]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)

  def _draw_shard(self, step: int, shard: int) -> np.ndarray:
    first = shard * self.dataset_size // VIRTUAL_SHARDS
    size = (shard + 1) * self.dataset_size // VIRTUAL_SHARDS - first
    if size == 0:
      return np.empty(0, np.int64)
    q = self.sampling_probability
    rng = _generator(self.key, _POISSON, shard, step)
    enough = int(size * q + 6 * (size * q) ** 0.5) + 8
    positions = np.empty(0, np.int64)
    last = -1
    while last < size:
      # A gap past the end ends the shard; cutting it there keeps the sum in range.
      gaps = np.minimum(rng.geometric(q, enough), size + 1)
      positions = np.concatenate([positions, last + np.cumsum(gaps)])
      last = positions[-1]
    return first + positions[positions < size]


@dataclasses.dataclass(frozen=True)
class TruncatedPoissonSampler:
  """Poisson, but never more than `truncated_batch_size`: the surplus is dropped at random.

  Formal guarantee: draws are independent, and each is what
  `dp_accounting.TruncatedSubsampledGaussianDpEvent(N, q, truncated_batch_size, ...)` assumes:
  the Poisson sample where it is small enough, else a subset of it of that size, all subsets
  being equally likely. Source: Chua et al. 2024 (arXiv 2411.04205); for its accounting
  arXiv 2508.15089.

  Attributes:
    dataset_size: N, fixed and public.
    expected_batch_size: q N, before anything is dropped.
    key: two 64-bit words, secret.
    truncated_batch_size: the most that a draw can hold.
  """

  dataset_size: int
  expected_batch_size: int
  key: tuple[int, int] = dataclasses.field(repr=False)
  truncated_batch_size: int

  def draw(self, step: int) -> np.ndarray:
    """Indices drawn at `step`, ascending int64."""
    drawn = PoissonSampler(self.dataset_size, self.expected_batch_size, self.key).draw(step)
    if len(drawn) <= self.truncated_batch_size:
      return drawn
    rng = _generator(self.key, _TRUNCATE, 0, step)
    dropped = rng.choice(len(drawn), len(drawn) - self.truncated_batch_size, replace=False)
    return np.delete(drawn, dropped)


@dataclasses.dataclass(frozen=True)
class ShuffleSampler:
  """Batches of exactly the expected size from a fresh permutation every epoch.

  No accountant here covers it, so it goes only with the mechanism 'none'. A permutation
  of all N indices is held in memory (8 bytes each); the last N mod batch are left out
  of an epoch.
  """

  dataset_size: int
  expected_batch_size: int
  key: tuple[int, int] = dataclasses.field(repr=False)

  def draw(self, step: int) -> np.ndarray:
    """Indices of `step`, ascending int64."""
    steps_per_epoch = self.dataset_size // self.expected_batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = _generator(self.key, _SHUFFLE, 0, epoch).permutation(self.dataset_size)
    first = position * self.expected_batch_size
    return np.sort(order[first : first + self.expected_batch_size])


SAMPLERS = {
  'poisson': PoissonSampler,
  'truncated_poisson': TruncatedPoissonSampler,
  'shuffle': ShuffleSampler,
}
