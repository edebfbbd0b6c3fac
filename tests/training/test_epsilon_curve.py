"""The curve: the accountant's own epsilon for any number of releases, expected or not."""

import dp_accounting
import pytest
from dp_accounting import pld

from dpcap import privacy
from dpcap.training.epsilon_curve import EpsilonCurve


def test_it_is_what_dp_accounting_says_of_each_number_of_releases(monkeypatch):
  plan = privacy.PrivacyPlan(
    1000, 100, steps=30, delta=1e-5, clip_norm=1.0, noise_multiplier=2.345
  )
  made, make = [], pld.privacy_loss_distribution.from_gaussian_mechanism
  monkeypatch.setattr(
    pld.privacy_loss_distribution,
    'from_gaussian_mechanism',
    lambda sigma, **settings: made.append(sigma) or make(sigma, **settings),
  )
  curve = EpsilonCurve(plan)
  found = {}
  for releases in (1, 10, 20, 37):
    curve.expect(releases + 10)
    found[releases] = curve.at(releases)
  curve.close()
  assert made == [2.345]  # once, whatever thread was first
  monkeypatch.undo()
  for releases, epsilon in found.items():
    step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(2.345))
    direct = pld.PLDAccountant(privacy.accounting.ADJACENCY).compose(step, releases)
    assert direct.get_epsilon(1e-5) <= epsilon * (1 + 1e-12)
    assert epsilon == pytest.approx(direct.get_epsilon(1e-5), rel=1e-6)


def test_a_run_without_noise_has_an_infinite_one():
  plan = privacy.PrivacyPlan(
    1000, 100, steps=3, delta=1e-5, clip_norm=1.0, noise_multiplier=0.0, mechanism='none'
  )
  curve = EpsilonCurve(plan)
  curve.expect(2)
  assert curve.at(2) == float('inf')
  curve.close()
