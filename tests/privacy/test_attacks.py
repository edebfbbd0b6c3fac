"""Attacks: no bound below the Gaussian mechanism's closed form, nor far above it."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import optimize, stats

from dpcap import privacy
from dpcap.privacy import accounting, attacks


def make_event(noise_multiplier, steps, q=1.0):
  noise = dp_accounting.GaussianDpEvent(noise_multiplier)
  return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(q, noise), steps)


@pytest.mark.parametrize('mu, steps', [(0.1, 1), (1.0, 1), (1.0, 9), (4.0, 4)])
def test_without_sampling_it_is_that_of_the_gaussian_mechanism(mu, steps):
  event = make_event(steps**0.5 / mu, steps)
  for rate in (0.3, 0.01, 0.001):
    exact = stats.norm.cdf(stats.norm.ppf(rate) + mu)
    assert exact <= attacks.true_positive_rate(event, rate) <= exact * (1 + 1e-5)
  assert mu <= attacks.gaussian_mu(event) <= mu * (1 + 1e-12)


def test_the_mu_gives_the_deltas_of_the_pld():
  event = make_event(4.0, 9)
  mu, losses = attacks.gaussian_mu(event), accounting.privacy_losses(event)
  for epsilon in np.linspace(0, 3, 7):
    delta = stats.norm.cdf(mu / 2 - epsilon / mu)
    delta -= math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert losses.get_delta_for_epsilon(epsilon) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize('q, noise_multiplier', [(0.3, 0.8), (0.05, 0.5)])
def test_no_attack_on_a_sampled_step_does_better(q, noise_multiplier):
  # The best ones by Neyman and Pearson: a threshold on the one coordinate that differs.
  event = make_event(noise_multiplier, 1, q)
  assert attacks.gaussian_mu(event) is None
  without = stats.norm(0, noise_multiplier)
  there = lambda x: (1 - q) * without.sf(x) + q * without.sf(x - 1)
  for rate in (0.01, 0.001):
    bound = attacks.true_positive_rate(event, rate)
    by_high = there(without.isf(rate))
    swapped = optimize.brentq(lambda x, r=rate: 1 - there(x) - r, -9, 9)  # which is there, reversed
    assert max(by_high, without.cdf(swapped)) <= bound <= 1.05 * by_high


def test_no_noise_leaves_nothing_to_say():
  event = dp_accounting.SelfComposedDpEvent(dp_accounting.NonPrivateDpEvent(), 3)
  assert attacks.true_positive_rate(event, 0.01) is None
  assert attacks.gaussian_mu(event) is None
  assert attacks.true_positive_rate(make_event(1e-3, 1000), 0.01) is None


def test_before_the_first_release_an_attack_guesses():
  plan = privacy.PrivacyPlan(1000, 100, 5, 1e-5, 1.0, 2.0)
  assert plan.attack_tpr(0.01, 0) == 0.01 and plan.gaussian_mu(0) == 0
  assert 0.01 < plan.attack_tpr(0.01, 1) < plan.attack_tpr(0.01, 5) < 0.1
