"""The least noise that keeps a run within an epsilon."""

import math
from collections.abc import Callable

import dp_accounting

from dpcap.privacy import accounting

# Noise past which more noise is not taken to help.
_LARGEST_NOISE_MULTIPLIER = 1e6

# Calibration stops here: with less noise the PLD takes minutes, and RDP has nothing to say.
SMALLEST_NOISE_MULTIPLIER = {'pld': 0.1, 'rdp': 0.01}

# Of a calibrated noise multiplier, relative.
_TOLERANCE = 1e-4

# Of the PLDs asked in turn: each finds where the next, ten times slower, begins.
_INTERVALS = (100 * accounting.INTERVAL, 10 * accounting.INTERVAL, accounting.INTERVAL)

# d log epsilon / d log noise_multiplier: as for one release, and how far from it can be meant.
_SLOPE, _STEEPEST, _FLATTEST = -1.0, -30.0, -0.3


def calibrate_noise_multiplier(
  make_event: Callable[[float], dp_accounting.DpEvent],
  target_epsilon: float,
  delta: float,
  accountant: str,
) -> float:
  """The smallest noise multiplier whose event spends at most `target_epsilon`.

  Args:
    make_event: noise_multiplier -> the composed event of the whole run.
    target_epsilon: positive and finite.
    delta: in (0, 1).
    accountant: a key of ACCOUNTANTS; epsilon is `accounting.tightest_epsilon`.

  Returns:
    A noise multiplier that meets it, by about 1e-4 of itself the smallest that does (or
    about 0.1, if less noise than that would do).

  Raises:
    ValueError: if no noise multiplier up to 1e6 meets the target.
  """
  event = make_event(1.0)
  if not accounting.covers(event, 'rdp') and delta <= accounting.smallest_delta(event.count):
    raise ValueError(
      f'delta is {delta:g}: the accountant {accountant!r} resolves none below'
      f' {accounting.smallest_delta(event.count):.2g} in {event.count:,} steps, and no other'
      ' covers this sampler; raise delta, or take fewer steps'
    )
  # The RDP bound takes milliseconds where the PLD takes seconds.
  bounds = [
    lambda sigma: accounting.epsilon(accounting.with_whole_draws(make_event(sigma)), delta, 'rdp')
  ]
  if accountant == 'pld':
    bounds += [
      lambda sigma, interval=interval: accounting.tightest_epsilon(
        make_event(sigma), delta, accountant, interval
      )
      for interval in _INTERVALS
    ]
  smallest = SMALLEST_NOISE_MULTIPLIER[accountant]
  start, found = (1.0, _SLOPE), None
  for bound in bounds:
    found = _least_noise(bound, target_epsilon, smallest, *start)
    start = found or start  # what a rough bound cannot meet, a finer one may
  if found is None:
    raise ValueError(
      f'epsilon is {target_epsilon}: by the accountant {accountant!r} no noise_multiplier'
      f' up to {_LARGEST_NOISE_MULTIPLIER:g} meets it at delta {delta:g}; raise epsilon or'
      ' delta, or take fewer steps or a smaller expected_batch_size'
    )
  return found[0]


def _least_noise(bound, target, smallest, sigma, slope):
  """By secants in logarithms, from `sigma` on: the noise and the slope there, or None."""
  low, high, before = 0.0, math.inf, None  # too little noise, and enough
  sigma = max(sigma, smallest)
  while sigma <= _LARGEST_NOISE_MULTIPLIER:
    epsilon = bound(sigma)
    if 0 < epsilon < math.inf:
      here = math.log(sigma), math.log(epsilon / target)
      if before and abs(here[0] - before[0]) > _TOLERANCE / 100:
        slope = (here[1] - before[1]) / (here[0] - before[0])
        slope = min(max(slope, _STEEPEST), _FLATTEST)
      before = here
    if epsilon <= target:
      high = sigma
      # With less noise by the tolerance it would be more than the target.
      near = epsilon > 0 and here[1] >= slope * _TOLERANCE
      if near or sigma == smallest:
        return high, slope
    else:
      low = sigma
    if high < math.inf and high - low <= _TOLERANCE * high:
      return high, slope
    if 0 < epsilon < math.inf:
      sigma *= math.exp(-here[1] / slope + _TOLERANCE / 3)
    else:
      sigma = 2 * low if high == math.inf else high / 2
    if not low < sigma < high:
      sigma = math.sqrt(low * high) if low and high < math.inf else 2 * low or high / 2
    sigma = max(sigma, smallest)
  return None
