"""A plan: wrong values and pairs are refused at the door, by name."""

import dataclasses
import math

import numpy as np
import pytest

from dpcap import privacy

NAN, INF = float('nan'), float('inf')
RIGHT = dict(
  dataset_size=1000,
  expected_batch_size=100,
  steps=50,
  delta=1e-5,
  clip_norm=1.0,
  noise_multiplier=1.5,
)
NOT_PRIVATE = dict(noise_multiplier=0.0, mechanism='none')

SIZES = [
  ('dataset_size', 0, 'at least 1'),
  ('dataset_size', -5, 'at least 1'),
  ('expected_batch_size', 0, 'from 1 to .*1000'),
  ('expected_batch_size', -1, 'from 1 to .*1000'),
  ('expected_batch_size', 1001, 'from 1 to .*1000'),
  ('expected_batch_size', NAN, 'from 1 to .*1000'),
  ('steps', 0, 'at least 1'),
  ('steps', NAN, 'at least 1'),
  ('delta', 0.0, 'above 0 and below 1'),
  ('delta', 1.0, 'above 0 and below 1'),
  ('delta', -1e-6, 'above 0 and below 1'),
  ('delta', NAN, 'above 0 and below 1'),
  ('clip_norm', 0.0, 'finite and at least'),
  ('clip_norm', -1.0, 'finite and at least'),
  ('clip_norm', INF, 'finite and at least'),
  ('clip_norm', NAN, 'finite and at least'),
  ('mechanism', 'laplace', 'gaussian, none'),
  ('sampler', 'cyclic', 'poisson, truncated_poisson, shuffle'),
  ('accountant', 'moments', 'pld, rdp'),
]


@pytest.mark.parametrize(
  'field, value, allowed',
  [
    *SIZES,
    ('noise_multiplier', 0.0, 'finite and at least'),
    ('noise_multiplier', -0.5, 'finite and at least'),
    ('noise_multiplier', INF, 'finite and at least'),
    ('noise_multiplier', NAN, 'finite and at least'),
  ],
)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(field, value, allowed):
  with pytest.raises(ValueError, match=rf'{field} is {value!r};.*{allowed}'):
    privacy.PrivacyPlan(**(RIGHT | {field: value}))


@pytest.mark.parametrize(
  'field, value, allowed',
  [
    *SIZES,
    ('epsilon', 0.0, 'positive'),
    ('epsilon', -8.0, 'positive'),
    ('epsilon', -INF, 'positive'),
    ('epsilon', NAN, 'positive'),
    ('mechanism', 'none', 'epsilon is 8.0.*epsilon = inf'),
  ],
)
def test_calibrate_refuses_the_same_and_a_wrong_epsilon(field, value, allowed):
  right = {key: RIGHT[key] for key in RIGHT if key != 'noise_multiplier'} | {'epsilon': 8.0}
  with pytest.raises(ValueError, match=rf'{field} is {value!r}.*{allowed}'):
    privacy.calibrate(**(right | {field: value}))


def test_a_sampler_that_no_accountant_covers_is_refused_with_the_pairs_that_go():
  message = "sampler is 'shuffle' and mechanism is 'gaussian'.*poisson with gaussian"
  with pytest.raises(ValueError, match=message):
    privacy.PrivacyPlan(**RIGHT, sampler='shuffle')
  right = {key: RIGHT[key] for key in RIGHT if key != 'noise_multiplier'}
  with pytest.raises(ValueError, match=message):
    privacy.calibrate(epsilon=8.0, sampler='shuffle', **right)


TRUNCATED = RIGHT | dict(sampler='truncated_poisson')


@pytest.mark.parametrize('value', [0, 99, 1001])
def test_a_truncation_that_makes_no_sense_is_refused(value):
  with pytest.raises(
    ValueError, match=f'truncated_batch_size is {value}; .* from .*100, to .*1000'
  ):
    privacy.PrivacyPlan(**TRUNCATED, truncated_batch_size=value)


@pytest.mark.parametrize('sampler', ['poisson', 'shuffle'])
def test_truncation_goes_with_its_sampler_only(sampler):
  changes = dict(sampler=sampler, truncated_batch_size=200)
  with pytest.raises(ValueError, match="is 200; it goes with sampler 'truncated_poisson' only"):
    privacy.PrivacyPlan(**(RIGHT | (NOT_PRIVATE if sampler == 'shuffle' else {}) | changes))


def test_a_truncated_draw_is_accounted_by_pld_only():
  with pytest.raises(ValueError, match="accountant is 'rdp', which does not cover.*truncated"):
    privacy.PrivacyPlan(**TRUNCATED, accountant='rdp')
  plan = privacy.PrivacyPlan(**TRUNCATED)
  assert plan.epsilon(accountant='rdp') is None
  # Eight deviations of sqrt(100 * 0.9) above the mean.
  assert plan.truncated_batch_size == 176
  assert plan.make_sampler((1, 2)).truncated_batch_size == 176
  assert dataclasses.replace(plan, expected_batch_size=1000, truncated_batch_size=None) == (
    privacy.PrivacyPlan(**(TRUNCATED | {'expected_batch_size': 1000}), truncated_batch_size=1000)
  )


@pytest.mark.parametrize('noise_multiplier', [1.5, -1.0, NAN])
def test_noise_without_a_mechanism_is_refused(noise_multiplier):
  with pytest.raises(ValueError, match=f'noise_multiplier is {noise_multiplier}.*must be 0'):
    privacy.PrivacyPlan(**(RIGHT | NOT_PRIVATE | {'noise_multiplier': noise_multiplier}))


@pytest.mark.parametrize('sampler', ['poisson', 'shuffle'])
@pytest.mark.parametrize('mechanism', ['gaussian', 'none'])
def test_infinite_epsilon_gives_the_plan_without_privacy(sampler, mechanism):
  right = {key: RIGHT[key] for key in RIGHT if key != 'noise_multiplier'} | {'clip_norm': INF}
  plan = privacy.calibrate(epsilon=INF, sampler=sampler, mechanism=mechanism, **right)
  assert not plan.private
  assert plan.epsilon() == math.inf
  assert plan == privacy.PrivacyPlan(**(RIGHT | NOT_PRIVATE | right), sampler=sampler)


def test_a_private_plan_is_private_and_frozen():
  plan = privacy.PrivacyPlan(**RIGHT)
  assert plan.private
  assert plan.sampling_probability == 0.1
  with pytest.raises(dataclasses.FrozenInstanceError):
    plan.noise_multiplier = 0.1


def test_the_sampler_and_the_mechanism_carry_the_plans_numbers():
  plan = privacy.PrivacyPlan(**(RIGHT | {'clip_norm': 0.3}))
  sampler, mechanism = plan.make_sampler((1, 2)), plan.make_mechanism()
  assert isinstance(sampler, privacy.SAMPLERS['poisson'])
  assert isinstance(mechanism, privacy.MECHANISMS['gaussian'])
  assert (sampler.dataset_size, sampler.expected_batch_size) == (1000, 100)
  assert (mechanism.noise_multiplier, mechanism.clip_norm) == (1.5, 0.3)
  np.testing.assert_array_equal(
    sampler.draw(7), privacy.SAMPLERS['poisson'](1000, 100, (1, 2)).draw(7)
  )
  shuffled = privacy.PrivacyPlan(**(RIGHT | NOT_PRIVATE), sampler='shuffle')
  assert len(shuffled.make_sampler((1, 2)).draw(0)) == 100
  assert isinstance(shuffled.make_mechanism(), privacy.MECHANISMS['none'])


def test_the_event_counts_releases():
  event = privacy.PrivacyPlan(**RIGHT).event(7)
  assert event.count == 7
  assert event.event.sampling_probability == 0.1
  assert event.event.event.noise_multiplier == 1.5


def test_a_simulation_has_the_noise_for_its_signal_and_no_guarantee():
  run = privacy.PrivacyPlan(**RIGHT)
  plan = run.simulation(20)
  assert (plan.expected_batch_size, plan.noise_multiplier) == (5, 1.5 / 20)
  assert plan.sampling_probability == 5 / 1000
  assert plan.noise_multiplier / plan.expected_batch_size == pytest.approx(1.5 / 100)
  assert (plan.steps, plan.delta, plan.clip_norm) == (run.steps, run.delta, run.clip_norm)
  assert plan.noisy and not plan.private and plan.simulation_divisor == 20
  assert plan.epsilon() == plan.epsilon(accountant='rdp') == math.inf
  assert plan.attack_tpr(0.01, 50) is None and plan.gaussian_mu(50) is None
  assert plan.simulated.epsilon() == run.epsilon() < math.inf
  assert run.simulated is None and run.private
  # What runs: it draws its own batch, and adds its own noise.
  assert plan.make_sampler((1, 2)).expected_batch_size == 5
  assert plan.make_mechanism().noise_multiplier == 1.5 / 20
  assert privacy.PrivacyPlan(**dataclasses.asdict(plan)) == plan


def test_a_simulation_may_have_less_noise_than_a_run():
  plan = privacy.PrivacyPlan(**(RIGHT | {'noise_multiplier': 0.05})).simulation(100)
  assert plan.noise_multiplier == 0.05 / 100


@pytest.mark.parametrize('divisor', [0, -1, 3, 200, 2.0, True, NAN])
def test_a_divisor_that_does_not_divide_the_batch_is_refused(divisor):
  message = f'simulation_divisor is {divisor}; .* that divides expected_batch_size, 100'
  with pytest.raises(ValueError, match=message):
    privacy.PrivacyPlan(**RIGHT).simulation(divisor)


@pytest.mark.parametrize('divisor', [0, 2.0, 11])
def test_a_simulation_of_what_cannot_run_is_refused(divisor):
  # 11 x 100 is more than the data.
  with pytest.raises(ValueError, match='simulation_divisor is|expected_batch_size is 1100'):
    privacy.PrivacyPlan(**RIGHT, simulation_divisor=divisor)


def test_without_noise_there_is_nothing_to_simulate():
  plan = privacy.PrivacyPlan(**(RIGHT | NOT_PRIVATE))
  with pytest.raises(ValueError, match="simulation_divisor is 2; with mechanism 'none'"):
    plan.simulation(2)


def test_a_simulation_truncates_its_own_draws():
  run = privacy.PrivacyPlan(**TRUNCATED)
  plan = run.simulation(10)
  assert plan.truncated_batch_size == math.ceil(10 + 8 * math.sqrt(10 * 0.99))
  assert plan.simulated == run and run.truncated_batch_size == 176
  with pytest.raises(ValueError, match='truncated_batch_size is 150; with simulation_divisor'):
    dataclasses.replace(run, truncated_batch_size=150).simulation(10)
