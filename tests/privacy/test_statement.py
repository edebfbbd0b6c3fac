"""The statement: complete, readable by programs, and never more than is true."""

import dataclasses
import json
import math

import pytest

from dpcap import privacy

PLAN = privacy.PrivacyPlan(
  dataset_size=12_345,
  expected_batch_size=678,
  steps=90,
  delta=2.5e-6,
  clip_norm=0.3,
  noise_multiplier=1.75,
)


def make(plan=PLAN, steps=90, releases=90, fixed_seed=False):
  return privacy.make_statement(
    plan,
    steps=steps,
    releases=releases,
    clipping_strategy='vmap',
    clip_function='Clip()',
    fixed_seed=fixed_seed,
    not_covered=['the vocabulary, if it was made from the private data (here: bert-uncased)'],
  )


def without_noise(sampler='poisson'):
  return privacy.calibrate(
    epsilon=math.inf,
    dataset_size=100,
    expected_batch_size=10,
    steps=5,
    delta=1e-3,
    clip_norm=math.inf,
    sampler=sampler,
  )


def test_a_truncated_draw_is_named_with_its_maximum():
  plan = dataclasses.replace(PLAN, sampler='truncated_poisson', truncated_batch_size=900)
  statement = make(plan)
  assert statement['truncated_batch_size'] == 900
  assert statement['epsilon']['rdp'] is None and statement['epsilon']['pld'] > 0
  assert statement['private'] is True
  assert 'truncated Poisson' in statement['text'] and 'at most 900.' in statement['text']
  assert make()['truncated_batch_size'] is None and 'at most' not in make()['text']


def refuse(constant):
  raise AssertionError(f'{constant} is no JSON')


def test_all_that_invariant_10_asks_for_is_there():
  statement = make(releases=93)
  assert statement['private'] is True
  assert statement['unit'] == 'one image-text pair'
  assert 'zero-out' in statement['adjacency'] and 'replaced by nothing' in statement['adjacency']
  assert 'Gaussian' in statement['mechanism'] and 'Poisson' in statement['sampler']
  assert statement['dataset_size'] == 12_345
  assert statement['expected_batch_size'] == 678
  assert statement['sampling_probability'] == 678 / 12_345
  assert statement['noise_multiplier'] == 1.75
  assert statement['clip_norm'] == 0.3
  assert statement['clipping'] == 'vmap'
  assert statement['sensitivity_rounding_margin'] <= 1e-5
  assert (statement['steps'], statement['releases']) == (90, 93)
  assert statement['delta'] == 2.5e-6
  assert statement['accountant'] == 'pld'
  assert statement['epsilon'] == {name: PLAN.epsilon(93, name) for name in ('pld', 'rdp')}
  for words in ('entropy', 'secret', '64 bits', '128 bits'):
    assert words in statement['key_policy']
  excluded = ' '.join(statement['not_covered'])
  for words in ('hyper-parameters', 'vocabulary', 'bert-uncased', 'other runs', 'float32'):
    assert words in excluded


def test_the_text_says_the_numbers_and_what_is_not_covered():
  statement = make(releases=93)
  text = statement['text']
  assert text == privacy.statement_text(statement)
  assert f'{PLAN.epsilon(93, "pld"):.3f} by PLD' in text
  assert f'{PLAN.epsilon(93, "rdp"):.3f} by RDP' in text
  for number in ('2.5e-06', '1.75', 'C = 0.3', '678', '12,345', '0.0549', '93', '90'):
    assert number in text
  for words in ('Poisson', 'Gaussian', 'zero-out', 'one image-text pair', 'entropy'):
    assert words in text
  for words in statement['not_covered']:
    assert words in text
  assert 'NO' not in text


@pytest.mark.parametrize('fixed_seed', [False, True])
@pytest.mark.parametrize(
  'plan',
  [PLAN, without_noise(), without_noise('shuffle')],
  ids=['private', 'no noise', 'shuffled'],
)
def test_it_survives_json_without_nan_or_infinity(plan, fixed_seed):
  statement = make(plan, fixed_seed=fixed_seed)
  text = json.dumps(statement, allow_nan=False)
  assert json.loads(text, parse_constant=refuse) == statement


def test_a_fixed_seed_voids_the_guarantee():
  statement = make(fixed_seed=True)
  assert statement['private'] is False
  assert 'seed' in statement['key_policy'] and 'entropy' not in statement['key_policy']
  assert 'NO privacy guarantee' in statement['text'] and 'seed' in statement['text']
  assert 'differentially private' not in statement['text']


@pytest.mark.parametrize('fixed_seed', [False, True])
@pytest.mark.parametrize('sampler', ['poisson', 'shuffle'])
def test_infinite_epsilon_is_no_guarantee(sampler, fixed_seed):
  statement = make(without_noise(sampler), fixed_seed=fixed_seed)
  assert statement['private'] is False
  assert statement['epsilon'] == {'pld': None, 'rdp': None}
  assert statement['clip_norm'] is None
  assert 'NO privacy guarantee' in statement['text'] and 'no noise' in statement['text']
  assert 'differentially private' not in statement['text']


def test_releases_beyond_the_steps_raise_epsilon_by_every_accountant():
  exact, more = make(), make(releases=120)
  for name in ('pld', 'rdp'):
    assert more['epsilon'][name] > exact['epsilon'][name]


def test_an_early_checkpoint_has_spent_less():
  early, late = make(steps=10, releases=10), make()
  assert 0 < early['epsilon']['pld'] < late['epsilon']['pld']


def test_fewer_releases_than_steps_are_refused():
  with pytest.raises(ValueError, match='releases is 3.*steps'):
    make(steps=90, releases=3)


def test_a_bound_by_rdp_alone_is_a_guarantee():
  plan = dataclasses.replace(PLAN, delta=1e-16)
  statement = make(plan)
  assert statement['private'] is True and statement['epsilon']['pld'] is None
  assert statement['epsilon']['rdp'] == plan.epsilon(accountant='rdp')
  assert 'by RDP' in statement['text'] and 'PLD' not in statement['text']
  assert 'NO' not in statement['text']


def test_what_an_attack_finds_is_said_and_never_rounded_down():
  statement = make(releases=93)
  rates = statement['attack_tpr']
  assert rates == {str(rate): PLAN.attack_tpr(rate, 93) for rate in (0.01, 0.001)}
  for name, words in (('0.01', '1.0%'), ('0.001', '0.1%')):
    before = statement['text'].split(f'% at a false-positive rate of {words}')[0]
    said = float(before.split()[-1])
    assert rates[name] <= said / 100 <= rates[name] + 1e-4
  assert statement['gdp_mu'] is None and 'Gaussian differentially' not in statement['text']


def test_without_sampling_the_gaussian_mu_is_said_and_never_rounded_down():
  plan = dataclasses.replace(PLAN, expected_batch_size=12_345, noise_multiplier=30.0)
  statement = make(plan)
  assert statement['gdp_mu'] == pytest.approx(90**0.5 / 30, rel=1e-12)
  assert 'It is 0.3163-Gaussian differentially private.' in statement['text']  # 0.31623


@pytest.mark.parametrize('fixed_seed', [False, True])
def test_no_guarantee_says_nothing_of_attacks(fixed_seed):
  statement = make(PLAN if fixed_seed else without_noise(), fixed_seed=fixed_seed)
  assert statement['gdp_mu'] is None
  assert statement['attack_tpr'] == {'0.01': None, '0.001': None}
  assert 'attack' not in statement['text']


@pytest.mark.parametrize(
  'delta, limits, published',
  [
    (1e-4, ['1/N = 8.1e-05'], '1.23'),
    (0.01, ['1/N = 8.1e-05', '0.001'], '123'),
    (1 / 12_345, [], None),
    (2.5e-6, [], None),
  ],
)
def test_a_large_delta_is_spelled_out(delta, limits, published):
  statement = make(dataclasses.replace(PLAN, delta=delta))
  said = statement['delta_allows']
  if not limits:
    assert said is None and 'Caution' not in statement['text']
    return
  assert f'is above {" and ".join(limits)}:' in said
  assert 'publishes every record' in said and f'{published} of 12,345 on average' in said
  assert f'Caution: {said}.' in statement['text']


def test_a_delta_above_a_thousandth_is_large_for_few_records_too():
  plan = privacy.PrivacyPlan(100, 10, 5, 5e-3, 1.0, 2.0)
  assert make(plan, steps=5, releases=5)['delta_allows'].startswith('delta = 0.005 is above 0.001:')


def test_a_simulation_is_no_guarantee_and_names_the_run_that_it_simulates():
  statement = make(PLAN.simulation(6), releases=93)
  assert statement['private'] is False
  assert statement['epsilon'] == {'pld': None, 'rdp': None}
  assert statement['attack_tpr'] == {'0.01': None, '0.001': None} and statement['gdp_mu'] is None
  assert (statement['expected_batch_size'], statement['noise_multiplier']) == (113, 1.75 / 6)
  assert statement['sampling_probability'] == 113 / 12_345
  assert statement['clip_norm'] == 0.3 and statement['clip_function'] == 'Clip()'
  bounds = {name: PLAN.epsilon(93, name) for name in ('pld', 'rdp')}
  assert statement['simulates'] == {
    'divisor': 6,
    'expected_batch_size': 678,
    'noise_multiplier': pytest.approx(1.75),
    'sampling_probability': 678 / 12_345,
    'epsilon': pytest.approx(bounds),
  }
  text = statement['text']
  assert 'NO privacy guarantee' in text and 'differentially private' not in text
  assert 'a simulation, at batch 113 and noise multiplier 0.2917, of a run at batch 678' in text
  assert f'of epsilon {bounds["pld"]:.3f} by PLD, {bounds["rdp"]:.3f} by RDP' in text
  assert "not this model's" in text
  json.dumps(statement, allow_nan=False)
  assert make()['simulates'] is None and 'simulation' not in make()['text']
