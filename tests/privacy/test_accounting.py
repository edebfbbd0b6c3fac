"""Epsilon: the paper's runs, dp-accounting called directly, and calibration both ways."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy import optimize, special

from dpcap import privacy

N = 233_804_767
SMALL = dict(dataset_size=1000, expected_batch_size=100, steps=50, delta=1e-5, clip_norm=1.0)

both = pytest.mark.parametrize('accountant', ['rdp', 'pld'])


def make_plan(noise_multiplier, **changes):
  return privacy.PrivacyPlan(**(SMALL | changes), noise_multiplier=noise_multiplier)


@pytest.mark.parametrize(
  'size, batch, noise_multiplier, steps, by_rdp, by_pld',
  [
    (N, 1_310_720, 0.728, 5708, 8.05, 7.34),
    (N, 1_310_720, 1.18, 2854, 1.99, 1.78),
    (N, 200_000, 0.513, 5700, 7.98, 6.85),
    (N // 10, 131_072, 0.728, 5708, 7.35, 6.66),
    (N // 100, 13_107, 0.728, 5708, 6.63, 5.96),
  ],
  ids=['main', 'epsilon 2', 'batch 200,000', '10% of the data', '1% of the data'],
)
def test_the_runs_of_the_paper_spend_what_the_design_says(
  size, batch, noise_multiplier, steps, by_rdp, by_pld
):
  plan = privacy.PrivacyPlan(
    dataset_size=size,
    expected_batch_size=batch,
    steps=steps,
    delta=1 / size,
    clip_norm=1.0,
    noise_multiplier=noise_multiplier,
  )
  assert round(plan.epsilon(accountant='rdp'), 2) == by_rdp
  assert round(plan.epsilon(accountant='pld'), 2) == by_pld
  assert plan.epsilon() == plan.epsilon(accountant='pld')


@pytest.mark.parametrize(
  'size, batch, noise_multiplier, steps, delta, by_rdp',
  [
    (233_000_000, 98_304, 0.48, 6_000, 1 / 466_000_000, 7.996),
    (233_000_000, 81_920, 0.5, 10_000, 1 / 466_000_000, 6.996),
    (50_000, 4_096, 3.0, 2_500, 1e-5, 7.098),
    (1_281_167, 32_768, 2.5, 18_000, 8e-7, 7.980),
  ],
  ids=["ViP's run", "ViP's script", 'TAN on CIFAR-10', 'TAN on ImageNet'],
)
def test_the_runs_of_vip_and_tan_spend_what_they_state(
  size, batch, noise_multiplier, steps, delta, by_rdp
):
  # ViP's delta is 1 / (2 N), of N = 233 million.
  plan = privacy.PrivacyPlan(size, batch, steps, delta, 1.0, noise_multiplier, accountant='rdp')
  assert round(plan.epsilon(), 3) == by_rdp


def _divergence(order, q, noise_multiplier):
  """Renyi's, of one Poisson-sampled Gaussian, by integration on a grid."""
  z = np.linspace(-30 * noise_multiplier, order + 30 * noise_multiplier, 400_001)
  shift = (2 * z - 1) / (2 * noise_multiplier**2)
  log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + shift)
  log_density = -(z**2) / (2 * noise_multiplier**2) - math.log(
    math.sqrt(2 * math.pi) * noise_multiplier
  )
  integral = special.logsumexp(order * log_ratio + log_density) + math.log(z[1] - z[0])
  return integral / (order - 1)


def test_with_little_noise_for_a_large_q_rdp_bounds_but_lacks_the_best_orders():
  """ViP's script on ImageNet: 478 at order 1.2, where dp-accounting's series does not converge."""
  size, order, steps, delta = 1_281_167, 1.2, 10_000, 1 / (2 * 1_281_167)
  plan = privacy.PrivacyPlan(size, 81_920, steps, delta, 0.1, 0.5)
  divergence = steps * _divergence(order, plan.sampling_probability, 0.5)
  # Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), proposition 12; Balle et al. 2019.
  conversion = math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
  assert divergence + conversion == pytest.approx(478.0, abs=0.1)
  assert plan.epsilon(accountant='rdp') > 478
  # The PLD speaks here: 452.8, and with a coarse one, in less time, a little more.
  event = plan.event(steps)
  assert 452 < privacy.accounting.epsilon(event, delta, 'pld', interval=1e-2) < 478


@pytest.mark.parametrize(
  'accountant, make', [('rdp', rdp.RdpAccountant), ('pld', pld.PLDAccountant)]
)
def test_epsilon_is_that_of_dp_accounting_called_directly(rng, accountant, make):
  for _ in range(3):
    size = int(rng.integers(500, 5000))
    batch, steps = int(rng.integers(1, size // 5)), int(rng.integers(1, 100))
    delta, noise_multiplier = 10 ** rng.uniform(-8, -3), rng.uniform(1, 5)
    plan = privacy.PrivacyPlan(size, batch, steps, delta, 1.0, noise_multiplier)
    direct = make(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    direct.compose(
      dp_accounting.PoissonSampledDpEvent(
        batch / size, dp_accounting.GaussianDpEvent(noise_multiplier)
      ),
      steps,
    )
    expected = direct.get_epsilon(delta)
    assert plan.epsilon(accountant=accountant) == pytest.approx(expected, rel=1e-6)
    assert plan.sampling_probability == batch / size


def test_without_subsampling_epsilon_is_that_of_the_gaussian_mechanism():
  # Balle and Wang 2018 (arXiv 1805.06530), theorem 8: steps compose to one of sigma/sqrt(steps).
  plan = make_plan(8.0, expected_batch_size=1000, steps=4)
  epsilon, ratio = plan.epsilon(), 2 / 8.0
  cdf = lambda x: (1 + math.erf(x / 2**0.5)) / 2
  delta = cdf(ratio / 2 - epsilon / ratio) - math.exp(epsilon) * cdf(-ratio / 2 - epsilon / ratio)
  assert delta == pytest.approx(plan.delta, rel=1e-2)


@both
def test_epsilon_rises_with_steps_and_batch_and_falls_with_noise_and_delta(accountant):
  epsilon = lambda **changes: make_plan(
    changes.pop('noise_multiplier', 2.0), accountant=accountant, **changes
  ).epsilon()
  for name, values, rises in (
    ('steps', [1, 20, 50, 200], True),
    ('expected_batch_size', [1, 50, 100, 1000], True),
    ('noise_multiplier', [1.0, 2.0, 2.1, 8.0], False),
    ('delta', [1e-9, 1e-5, 1e-4], False),
  ):
    bounds = np.array([epsilon(**{name: value}) for value in values])
    assert np.all(np.diff(bounds) > 0 if rises else np.diff(bounds) < 0), name


def test_the_pld_bound_is_the_tighter_one(rng):
  for _ in range(4):
    plan = make_plan(rng.uniform(0.9, 6), expected_batch_size=int(rng.integers(10, 1000)))
    assert 0 < plan.epsilon(accountant='pld') < plan.epsilon(accountant='rdp')


def test_more_releases_than_steps_cost_more(rng):
  plan = make_plan(rng.uniform(1, 3))
  assert plan.epsilon(plan.steps) == plan.epsilon()
  assert plan.epsilon(plan.steps + 10) == dataclasses.replace(plan, steps=60).epsilon()
  assert plan.epsilon(plan.steps - 1) < plan.epsilon() < plan.epsilon(plan.steps + 1)
  assert plan.epsilon(0) == 0


@pytest.mark.parametrize(
  'epsilon, accountant', [(0.1, 'rdp'), (8.0, 'rdp'), (50.0, 'rdp'), (0.1, 'pld'), (1.0, 'pld')]
)
def test_calibration_finds_the_least_noise_within_epsilon(epsilon, accountant):
  plan = privacy.calibrate(epsilon=epsilon, accountant=accountant, **SMALL)
  assert 0.998 * epsilon <= plan.epsilon() <= epsilon
  less = dataclasses.replace(plan, noise_multiplier=0.99 * plan.noise_multiplier)
  assert less.epsilon() > epsilon
  assert plan == make_plan(plan.noise_multiplier, accountant=accountant)


def test_calibrating_the_main_run_by_rdp_gives_the_papers_noise():
  main = dict(dataset_size=N, expected_batch_size=1_310_720, steps=5708, delta=1 / N, clip_norm=1.0)
  plan = privacy.calibrate(epsilon=8.05, accountant='rdp', **main)
  assert plan.noise_multiplier == pytest.approx(0.728, abs=5e-4)


def test_calibrating_by_pld_needs_less_noise_than_by_rdp():
  by_rdp, by_pld = (
    privacy.calibrate(epsilon=1.0, accountant=name, **SMALL).noise_multiplier
    for name in ('rdp', 'pld')
  )
  assert by_pld < by_rdp


@both
def test_an_epsilon_that_no_noise_meets_is_refused(accountant):
  with pytest.raises(ValueError, match='epsilon is 1e-12.*no noise_multiplier.*raise epsilon'):
    privacy.calibrate(epsilon=1e-12, accountant=accountant, **(SMALL | {'delta': 1e-15}))


@pytest.mark.parametrize('steps, noise_multiplier', [(4, 2.0), (1000, 50.0), (50_000, 300.0)])
def test_no_delta_is_so_small_that_epsilon_falls_below_that_of_the_gaussian_mechanism(
  steps, noise_multiplier
):
  # The FFT of the PLD is off by 1e-13 after 50,000 steps, to either side.
  mu = steps**0.5 / noise_multiplier

  def delta_at(epsilon):
    enough, too_much = (special.log_ndtr(sign * mu / 2 - epsilon / mu) for sign in (1, -1))
    return math.exp(enough) * -math.expm1(epsilon + too_much - enough)

  for delta in (1e-6, 1e-10, 1e-12, 1e-13, 1e-14, 3e-15, 1e-16, 1e-30):
    plan = make_plan(noise_multiplier, expected_batch_size=1000, steps=steps, delta=delta)
    exact = optimize.brentq(lambda epsilon, d=delta: math.log(delta_at(epsilon) / d), 1e-9, 20)
    assert exact - 1e-9 <= plan.epsilon() < 1.25 * exact, delta
    bounds = [plan.epsilon(accountant=name) for name in privacy.ACCOUNTANTS]
    assert plan.epsilon() == min(bounds)


def test_below_what_a_pld_resolves_rdp_bounds_epsilon():
  few = dict(dataset_size=10_000, delta=1e-16)
  plan = make_plan(2.0, **few)
  assert plan.epsilon(accountant='pld') == math.inf
  assert plan.epsilon() == plan.epsilon(accountant='rdp') < 1
  found = privacy.calibrate(epsilon=1.0, **(SMALL | few))
  assert 0.998 < found.epsilon() <= 1 and 1.9 < found.noise_multiplier < 2.0


def test_an_epsilon_below_what_rdp_can_say_is_met_by_pld():
  few = dict(dataset_size=1_000_000, expected_batch_size=193, steps=80, delta=8e-9)
  assert make_plan(100.0, **few).epsilon(accountant='rdp') > 0.01
  plan = privacy.calibrate(epsilon=0.0019, **(SMALL | few))
  assert 0.998 * 0.0019 <= plan.epsilon() <= 0.0019 and plan.noise_multiplier < 6


def test_a_delta_that_no_accountant_of_the_sampler_resolves_is_refused_by_name():
  with pytest.raises(ValueError, match='delta is 1e-16.*resolves none below 8.5e-15 in 50 steps'):
    privacy.calibrate(epsilon=1.0, **(SMALL | {'delta': 1e-16}), sampler='truncated_poisson')


@pytest.mark.parametrize('epsilon', [20.0, 50.0])
def test_a_large_epsilon_is_calibrated_to_with_few_slow_plds(epsilon, monkeypatch):
  slow, make = [], pld.privacy_loss_distribution.from_gaussian_mechanism

  def counted(sigma, value_discretization_interval, **settings):
    slow.extend([sigma] * (value_discretization_interval <= privacy.accounting.INTERVAL))
    return make(sigma, value_discretization_interval=value_discretization_interval, **settings)

  monkeypatch.setattr(pld.privacy_loss_distribution, 'from_gaussian_mechanism', counted)
  plan = privacy.calibrate(epsilon=epsilon, **SMALL)
  assert 0.998 * epsilon <= plan.epsilon() <= epsilon
  assert len(slow) <= 3


def test_what_is_within_an_epsilon_is_so_by_the_plan_itself():
  plan = make_plan(2.0)
  assert plan.is_within(plan.epsilon()) and not plan.is_within(0.9999 * plan.epsilon())


def test_next_to_no_noise_has_no_finite_bound():
  for noise_multiplier in (1e-3, 0.02):
    assert make_plan(noise_multiplier, steps=10_000).epsilon() == math.inf


@pytest.mark.parametrize('truncated_batch_size, expected', [(1_310_720, 61.39), (None, 7.34)])
def test_truncating_at_the_mean_ruins_epsilon_and_far_above_it_costs_nothing(
  truncated_batch_size, expected
):
  plan = privacy.PrivacyPlan(
    dataset_size=N,
    expected_batch_size=1_310_720,
    steps=5708,
    delta=1 / N,
    clip_norm=1.0,
    noise_multiplier=0.728,
    sampler='truncated_poisson',
    truncated_batch_size=truncated_batch_size,
  )
  assert round(plan.epsilon(), 2) == expected


def test_truncated_epsilon_is_that_of_dp_accounting_called_directly(rng):
  size = int(rng.integers(500, 2000))
  batch, steps = int(rng.integers(10, size // 5)), int(rng.integers(1, 50))
  most, noise_multiplier = batch + int(rng.integers(1, 20)), rng.uniform(1, 3)
  plan = make_plan(
    noise_multiplier,
    dataset_size=size,
    expected_batch_size=batch,
    steps=steps,
    sampler='truncated_poisson',
    truncated_batch_size=most,
  )
  direct = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
  direct.compose(
    dp_accounting.TruncatedSubsampledGaussianDpEvent(size, batch / size, most, noise_multiplier),
    steps,
  )
  assert plan.epsilon() == pytest.approx(direct.get_epsilon(plan.delta), rel=1e-6)


def test_calibration_takes_truncation_into_account():
  target, settings = 0.3, SMALL | {'steps': 5}
  truncated = dict(sampler='truncated_poisson', truncated_batch_size=100)
  plan = privacy.calibrate(epsilon=target, **settings, **truncated)
  assert 0.998 * target <= plan.epsilon() <= target
  whole = privacy.calibrate(epsilon=target, **settings)
  assert plan.noise_multiplier > 1.05 * whole.noise_multiplier
  rare = dataclasses.replace(whole, sampler='truncated_poisson')
  assert rare.epsilon() == pytest.approx(target, rel=2e-3)


def test_truncation_with_next_to_no_noise_has_no_finite_bound():
  plan = make_plan(0.02, steps=10_000, sampler='truncated_poisson')
  assert plan.epsilon() == math.inf


def test_a_run_without_noise_has_infinite_epsilon():
  for sampler in ('poisson', 'truncated_poisson', 'shuffle'):
    plan = make_plan(0.0, mechanism='none', sampler=sampler)
    assert plan.epsilon(accountant='rdp') == math.inf
    assert plan.epsilon(accountant='pld') == math.inf
