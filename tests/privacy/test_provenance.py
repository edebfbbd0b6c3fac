"""What stands behind a model: guarantees add up along the chain, and nothing is left unsaid."""

import json

import pytest

from dpcap import privacy
from dpcap.privacy import provenance

PLAN = privacy.PrivacyPlan(
  dataset_size=1000,
  expected_batch_size=10,
  steps=5,
  delta=1e-4,
  clip_norm=1.0,
  noise_multiplier=4.0,
)
FILES, TEXTURES = ({'source': s, 'generated': s == 'textures'} for s in ('tar_shards', 'textures'))


def statement(data=FILES, start=None, parts=('all',), path='runs/first/checkpoints/5', **more):
  if start is not None:
    start = provenance.make_start(path, parts, start)
  return privacy.make_statement(
    PLAN,
    **{'steps': 5, 'releases': 5} | more,
    clipping_strategy='vmap',
    clip_function='Clip()',
    not_covered=[],
    data=data,
    start=start,
  )


FOREIGN = privacy.foreign_statement('base.pth', 'ab12' * 16, None)
OWN = {name: PLAN.epsilon(5, name) for name in ('pld', 'rdp')}


def times(n):
  return {name: pytest.approx(n * value) for name, value in OWN.items()}


def test_without_a_start_nothing_is_said_of_one():
  made = statement()
  assert made['init'] is None and made['data'] == FILES
  assert 'started from' not in made['text']


def test_generated_data_spend_nothing():
  made = statement(start=statement(TEXTURES, fixed_seed=True), parts=('encoder',))
  init = made['init']
  assert init['covered'] and init['parts'] == ['encoder']
  assert init['composed'] == {'epsilon': OWN, 'delta': 1e-4}
  assert 'runs/first/checkpoints/5 (encoder), trained on generated data alone' in made['text']
  assert '(textures): nothing private' in made['text']
  assert made['private'] and 'what the start was trained on' not in made['not_covered']
  for data in (FILES, TEXTURES):
    text = statement(data, start=statement(TEXTURES))['text']
    assert text.startswith('This model is (epsilon, delta)-') and 'run alone' not in text
  assert provenance.is_generated(statement(TEXTURES, start=statement(TEXTURES)))


def test_guarantees_of_two_private_runs_add_up():
  made = statement(start=statement(releases=9))
  first = {name: PLAN.epsilon(9, name) for name in ('pld', 'rdp')}
  total = {name: first[name] + OWN[name] for name in first}
  assert made['init']['covered']
  assert made['init']['composed'] == {
    'epsilon': {name: pytest.approx(value) for name, value in total.items()},
    'delta': 2e-4,
  }
  # The run's own are its own.
  assert made['epsilon'] == OWN and made['delta'] == 1e-4
  for number in (first['pld'], total['pld'], total['rdp']):
    assert f'{number:.3f} by' in made['text']
  assert 'add up' in made['text'] and 'delta = 0.0002' in made['text']
  # An attack on who is in both has more to go by.
  assert made['private'] and 'No attack on its run alone tells' in made['text']
  assert made['text'].startswith('Given the weights that it started from, this model is (epsilon')


def test_a_sum_says_for_whom_it_is_where_units_differ():
  """A group of nine in a run whose start saw nine pairs is nine units there: epsilons of nine."""
  first, group = statement(), 'group of near-duplicate image-text pairs'
  text = statement(start=first, unit=group)['text']
  said = 'The unit was another there (one image-text pair): the sum is for who is no more than one'
  assert said in text
  for again in (statement(start=first), statement(start=statement(TEXTURES), unit=group)):
    assert 'unit was another' not in again['text']
  assert said in statement(start=statement(TEXTURES, start=first), unit=group)['text']


def test_a_chain_adds_up_over_all_generations():
  """Generated, then private, generated, private: two runs touched data of people."""
  chain = statement(TEXTURES)
  for data in (FILES, TEXTURES, FILES):
    chain = statement(data, start=chain)
  assert chain['init']['composed'] == {'epsilon': times(2), 'delta': 2e-4}
  assert not provenance.is_generated(chain)
  middle = chain['init']['statement']
  assert middle['init']['composed'] == {'epsilon': times(1), 'delta': 1e-4}
  assert "own data are generated, which spends nothing more" in middle['text']
  assert middle['init']['statement']['init']['statement']['data'] == TEXTURES


@pytest.mark.parametrize('private', [True, False])
@pytest.mark.parametrize(
  'start, named',
  [
    (FOREIGN, 'file base.pth (SHA-256 ab12ab12'),
    (statement(start=FOREIGN), 'file base.pth (SHA-256 ab12ab12'),
    (statement(TEXTURES, start=FOREIGN), 'file base.pth (SHA-256 ab12ab12'),
    (statement(fixed_seed=True), 'a run on tar_shards without a guarantee'),
    (statement(None, fixed_seed=True), 'a run on data that are not recorded without a guarantee'),
    ({'of': 'another program'}, 'a run on data that are not recorded without a guarantee'),
  ],
)
def test_what_is_not_known_is_not_covered(start, named, private):
  made = statement(start=start, fixed_seed=not private)
  assert not made['init']['covered'] and made['init']['composed'] is None
  assert 'what the start was trained on' in made['not_covered']
  assert named in made['text'] and 'not covered' in made['text']
  assert not provenance.is_generated(made)
  # The model has no guarantee, whatever its run has.
  assert made['private'] is False and made['private_given_init'] is private
  assert made['text'].startswith('This model has NO privacy guarantee: ')
  given = 'Given the weights that it started from, this model is (epsilon, delta)-'
  assert (given in made['text']) is private
  assert set(made['attack_tpr'].values()) == {None} and 'attack' not in made['text']


def test_what_lacks_a_guarantee_is_named_and_no_run_that_has_one():
  made = statement(start=statement(start=FOREIGN))
  assert 'without a guarantee' not in made['text']
  of_tfds = {'source': 'tfds', 'generated': False}
  made = statement(start=statement(of_tfds, start=FOREIGN, fixed_seed=True))
  assert 'a run on tfds without a guarantee; file base.pth' in made['text']


@pytest.mark.parametrize('start', [statement(), statement(TEXTURES)])
def test_deltas_of_one_and_more_together_bound_nothing(start):
  made = statement(start=start | {'delta': 0.99995})
  none = start['data'] == FILES
  assert made['init']['covered'] and (made['init']['composed'] is None) is none
  assert made['private'] is not none and made['private_given_init']
  assert ('no bound is known' in made['text']) is none
  assert made['text'].startswith('This model has NO privacy guarantee: no bound') is none


@pytest.mark.parametrize(
  'changes',
  [
    {'epsilon': {'pld': float('inf'), 'rdp': float('nan')}},
    {'epsilon': {'pld': float('inf'), 'rdp': 1.0}},
    {'epsilon': {'pld': -1.0, 'rdp': 8.0}},
    {'epsilon': {'pld': 'small', 'rdp': 8.0}},
    {'epsilon': {}},
    {'epsilon': None},
    {'delta': None},
    {'delta': float('nan')},
    {'delta': -1e-6},
    {'delta': 1.0},
    {'init': {'statement': None}},
    {'init': {'path': 'x'}},
    {'init': ['x']},
    {'data': 'files', 'delta': None},
  ],
)
def test_figures_that_bound_nothing_are_no_guarantee(changes):
  """Whoever wrote them, and by hand."""
  made = statement(start=statement() | changes)
  assert not made['init']['covered'] and not made['private']
  assert 'is not covered: ' in made['text'] and 'is not covered: .' not in made['text']


def test_a_run_without_a_guarantee_has_no_sum():
  made = statement(start=statement(), fixed_seed=True)
  assert made['init']['covered'] and made['init']['composed'] is None
  assert 'NO privacy guarantee' in made['text'] and 'add up' not in made['text']
  assert f'{OWN["pld"]:.3f} by PLD' in made['text']


def test_an_accountant_that_covers_one_run_alone_has_no_sum():
  first = statement()
  first['epsilon'] = {'pld': 1.5, 'rdp': None}
  made = statement(start=first)
  total = {'pld': pytest.approx(1.5 + OWN['pld']), 'rdp': None}
  assert made['init']['composed']['epsilon'] == total
  first['epsilon'] = {'pld': None, 'rdp': None}
  assert not statement(start=first)['init']['covered']


def test_an_older_statement_without_its_data_counts_as_private():
  first = statement()
  del first['data'], first['init']
  assert statement(start=first)['init']['composed']['epsilon'] == times(2)


def test_an_entry_is_a_start_again_and_the_keys_mark_is_left_out():
  """A run that resumes takes the entry of its checkpoint."""
  first = statement()
  made = statement(start=first | {'ledger': {'era': 0}})
  again = privacy.make_statement(
    PLAN,
    steps=5,
    releases=5,
    clipping_strategy='vmap',
    clip_function='Clip()',
    not_covered=[],
    data=FILES,
    start=made['init'],
  )
  assert again == made and 'ledger' not in json.dumps(made)


def test_generated_data_without_noise_are_said_to_be_nobodys():
  made = statement(TEXTURES, fixed_seed=True)
  assert 'NO privacy guarantee' in made['text']
  assert 'generated (textures): nothing in them is private' in made['text']
  assert 'nobody' not in statement(fixed_seed=True)['text']


def test_weights_from_elsewhere_say_what_is_claimed_as_claimed():
  assert FOREIGN['private'] is False and set(FOREIGN['epsilon'].values()) == {None}
  assert 'Claimed' not in FOREIGN['text'] and 'ab12' in FOREIGN['text']
  text = privacy.foreign_statement('x.pth', 'ff', 'epsilon about 7')['text']
  assert 'Claimed, not proven, by who published a file of this name: epsilon about 7.' in text
  assert 'NO privacy guarantee is vouched for' in text
