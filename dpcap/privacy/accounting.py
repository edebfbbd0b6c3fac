"""Upper bounds on what a run's events reveal, by dp-accounting's accountants."""

import contextlib
import functools
import math
import sys
import threading

import dp_accounting
from absl import logging
from dp_accounting import pld, rdp

# One image-text pair replaced by nothing: N and q stay fixed and public.
ADJACENCY = dp_accounting.NeighboringRelation.REPLACE_SPECIAL

ACCOUNTANTS = {'pld': pld.PLDAccountant, 'rdp': rdp.RdpAccountant}

# Between the privacy losses that a PLD knows. A wider one bounds too, in less time.
INTERVAL = 1e-4

# Above this epsilon (by RDP) the PLD accountant takes minutes and says nothing more.
_NO_GUARANTEE = 2000.0

# A PLD is composed by raising an FFT to the power of the releases, whose rounding is in no
# bound of dp-accounting: at most 0.6 of an epsilon of the machine a release, against the same in
# 80 bits, for noise of 0.3 to 20, q of 1e-6 to 1 and up to 100,000 releases.
_ROUNDING = 0.75 * sys.float_info.epsilon

# What a thread has found is there for the next one; and _quiet is a matter of the whole process.
_ONE_THREAD = threading.Lock()


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


def with_whole_draws(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
  """A composed event without the truncation of its draws: never more, which RDP covers."""
  if not isinstance(event, dp_accounting.SelfComposedDpEvent):
    return event
  step = event.event
  if not isinstance(step, dp_accounting.TruncatedSubsampledGaussianDpEvent):
    return event
  noise = dp_accounting.GaussianDpEvent(step.noise_multiplier)
  whole = dp_accounting.PoissonSampledDpEvent(step.sampling_probability, noise)
  return dp_accounting.SelfComposedDpEvent(whole, event.count)


def smallest_delta(releases: int) -> float:
  """The delta below which rounding leaves the PLD of so many releases nothing to say."""
  return (releases + 1) * _ROUNDING


def epsilon(
  event: dp_accounting.DpEvent, delta: float, accountant: str, interval: float = INTERVAL
) -> float | None:
  """The epsilon at `delta` of a composed event, under zero-out adjacency.

  Args:
    event: what was released in all.
    delta: in (0, 1).
    accountant: a key of ACCOUNTANTS.
    interval: between the losses of a PLD.

  Returns:
    An upper bound on epsilon, infinity if there is none (or it is past 2000, where the PLD is
    not computed, or delta is below what a PLD resolves), or None if the accountant does not
    cover the event.
  """
  if not covers(event, accountant):
    return None
  if accountant == 'rdp':
    return _rdp_epsilon(event, delta)
  return _pld_epsilon(event, delta, interval)


def tightest_epsilon(
  event: dp_accounting.DpEvent, delta: float, accountant: str, interval: float = INTERVAL
) -> float:
  """As `epsilon`, by the PLD or by RDP, whichever is less, if the accountant is 'pld'.

  Both bounds hold. At a delta near or below `smallest_delta` it is RDP's.
  """
  bound = epsilon(event, delta, accountant, interval)
  if accountant == 'pld' and covers(event, 'rdp'):
    by_rdp = epsilon(event, delta, 'rdp')
    return min(bound, by_rdp) if by_rdp <= _NO_GUARANTEE else math.inf
  return bound


def is_within(
  event: dp_accounting.DpEvent, target_epsilon: float, delta: float, accountant: str
) -> bool:
  """Whether `tightest_epsilon` is known to be at most the target, mostly without computing it.

  True is always right. False may be wrong where a rough PLD is off by more than 1%.
  """
  rough = tightest_epsilon(event, delta, accountant, 10 * INTERVAL)
  if rough <= target_epsilon or rough > 1.01 * target_epsilon:
    return rough <= target_epsilon
  return tightest_epsilon(event, delta, accountant) <= target_epsilon


@functools.lru_cache(maxsize=1024)
def _rdp_epsilon(event, delta):
  bound = rdp.RdpAccountant(neighboring_relation=ADJACENCY)
  with _ONE_THREAD, _quiet():
    return float(bound.compose(event).get_epsilon(delta))


@functools.lru_cache(maxsize=1024)
def _pld_epsilon(event, delta, interval):
  losses, left = privacy_losses(event, interval), delta - smallest_delta(event.count)
  return math.inf if losses is None or left <= 0 else float(losses.get_epsilon_for_delta(left))


def privacy_losses(
  event: dp_accounting.DpEvent, interval: float = INTERVAL
) -> pld.privacy_loss_distribution.PrivacyLossDistribution | None:
  """The privacy losses of a composed event, rounded up; None if there is no guarantee.

  Its deltas are too small by at most `smallest_delta(event.count)`.
  """
  if isinstance(event.event, dp_accounting.NonPrivateDpEvent):
    return None
  if epsilon(with_whole_draws(event), 1e-5, 'rdp') > _NO_GUARANTEE:
    return None
  with _ONE_THREAD:
    return _composed(event, interval)


@functools.lru_cache(maxsize=2)
def _composed(event, interval):
  return _losses_of_step(event.event, interval).self_compose(event.count)


# Most of the time goes into this, which all releases of a run share.
@functools.lru_cache(maxsize=2)
def _losses_of_step(step, interval):
  settings = dict(value_discretization_interval=interval, neighboring_relation=ADJACENCY)
  if isinstance(step, dp_accounting.TruncatedSubsampledGaussianDpEvent):
    return pld.privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
      step.dataset_size,
      step.sampling_probability,
      step.truncated_batch_size,
      step.noise_multiplier,
      **settings,
    )
  return pld.privacy_loss_distribution.from_gaussian_mechanism(
    step.event.noise_multiplier, sampling_prob=step.sampling_probability, **settings
  )


def finite_or_none(bound: float | None) -> float | None:
  """An epsilon for JSON: None (null) where there is no finite bound."""
  return bound if bound is not None and math.isfinite(bound) else None
