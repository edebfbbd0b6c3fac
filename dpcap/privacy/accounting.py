"""Epsilon from a run's events, by dp-accounting's accountants."""

import contextlib
import functools
import math
from collections.abc import Callable

import dp_accounting
from absl import logging
from dp_accounting import pld, rdp

# One image-text pair replaced by nothing: N and q stay fixed and public.
ADJACENCY = dp_accounting.NeighboringRelation.REPLACE_SPECIAL

ACCOUNTANTS = {'pld': pld.PLDAccountant, 'rdp': rdp.RdpAccountant}

# Noise past which more noise is not taken to help.
_LARGEST_NOISE_MULTIPLIER = 1e6

# Calibration stops here: with less noise the PLD takes minutes, and RDP has nothing to say.
_SMALLEST_NOISE_MULTIPLIER = {'pld': 0.1, 'rdp': 0.01}

# Above this epsilon (by RDP) the PLD accountant takes minutes and says nothing more.
_NO_GUARANTEE = 2000.0

# Of a calibrated noise multiplier, relative.
_TOLERANCE = 1e-4


def covers(event: dp_accounting.DpEvent, accountant: str) -> bool:
  """Whether the accountant has a bound for the event under zero-out adjacency."""
  return ACCOUNTANTS[accountant](neighboring_relation=ADJACENCY).supports(event)


@contextlib.contextmanager
def _quiet():
  """Mutes the RDP accountant's lines on the orders it leaves out: the others still bound."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _with_whole_draws(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
  """A composed event without the truncation of its draws: never more, which RDP covers."""
  if not isinstance(event, dp_accounting.SelfComposedDpEvent):
    return event
  step = event.event
  if not isinstance(step, dp_accounting.TruncatedSubsampledGaussianDpEvent):
    return event
  noise = dp_accounting.GaussianDpEvent(step.noise_multiplier)
  whole = dp_accounting.PoissonSampledDpEvent(step.sampling_probability, noise)
  return dp_accounting.SelfComposedDpEvent(whole, event.count)


@functools.lru_cache(maxsize=1024)
def epsilon(event: dp_accounting.DpEvent, delta: float, accountant: str) -> float | None:
  """The epsilon at `delta` of a composed event, under zero-out adjacency.

  Args:
    event: what was released in all.
    delta: in (0, 1).
    accountant: a key of ACCOUNTANTS.

  Returns:
    An upper bound on epsilon, infinity if there is none (or it is past 2000, where the
    PLD is not computed), or None if the accountant does not cover the event.
  """
  if not covers(event, accountant):
    return None
  if accountant == 'pld' and (epsilon(_with_whole_draws(event), delta, 'rdp') or 0) > _NO_GUARANTEE:
    return math.inf
  bound = ACCOUNTANTS[accountant](neighboring_relation=ADJACENCY)
  with _quiet():
    return float(bound.compose(event).get_epsilon(delta))


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
    accountant: a key of ACCOUNTANTS.

  Returns:
    A noise multiplier that meets it, by about 1e-4 of itself the smallest that does (or
    about 0.1, if less noise than that would do).

  Raises:
    ValueError: if no noise multiplier up to 1e6 meets the target.
  """
  high = 1.0
  # The RDP bound takes milliseconds where the PLD takes seconds, and is nearly always
  # the looser one: its answer is where to look from.
  make_guide = lambda sigma: _with_whole_draws(make_event(sigma))
  guide = 'rdp' if covers(make_guide(high), 'rdp') else accountant
  while epsilon(make_guide(high), delta, guide) > target_epsilon:
    high *= 2
    if high > _LARGEST_NOISE_MULTIPLIER:
      raise ValueError(
        f'epsilon is {target_epsilon}: by the accountant {accountant!r} no noise_multiplier'
        f' up to {_LARGEST_NOISE_MULTIPLIER:g} meets it at delta {delta:g}; raise epsilon or'
        ' delta, or take fewer steps or a smaller expected_batch_size'
      )
  low = high / 2
  while epsilon(make_guide(low), delta, guide) <= target_epsilon:
    high, low = low, low / 2
    if low < _SMALLEST_NOISE_MULTIPLIER[accountant]:
      if guide == accountant:
        return high
      break
  else:
    high = _solve(make_guide, target_epsilon, delta, guide, low, high)
  if guide != accountant:
    while epsilon(make_event(high), delta, accountant) > target_epsilon:
      high *= 1.1
    low = 0.8 * high
    while epsilon(make_event(low), delta, accountant) <= target_epsilon:
      high, low = low, 0.8 * low
      if low < _SMALLEST_NOISE_MULTIPLIER[accountant]:
        return high
  return _solve(make_event, target_epsilon, delta, accountant, low, high)


def _solve(make_event, target_epsilon, delta, accountant, low, high):
  with _quiet():
    return dp_accounting.calibrate_dp_mechanism(
      lambda: ACCOUNTANTS[accountant](neighboring_relation=ADJACENCY),
      make_event,
      target_epsilon,
      delta,
      bracket_interval=dp_accounting.ExplicitBracketInterval(low, high),
      tol=_TOLERANCE * high,
    )


def finite_or_none(bound: float | None) -> float | None:
  """An epsilon for JSON: None (null) where there is no finite bound."""
  return bound if bound is not None and math.isfinite(bound) else None
