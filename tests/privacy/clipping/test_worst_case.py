"""The worst that a search finds in seconds; `python -m tests.privacy.clipping.search` goes on."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from tests.privacy.clipping import search
from tests.privacy.clipping.adversaries import CASES, GENES, decoded
from tests.privacy.clipping.search import SETTINGS, UNIT, Climb, Settings

# Of climbing, once it is compiled; of processor time, or a busy machine would search less.
SECONDS = 0.6

# Every way in which norms are computed; `ghost` computes them as `bookkeeping` does.
SEARCHED = {
  'bookkeeping': (
    'few tokens', 'square', 'wide', 'long', 'longest', 'large image', 'look-ups', 'tied',
    'long over time', 'with bias', 'few tokens, bfloat16', 'tied, float16', 'rests',
  ),
  'ghost': ('wide', 'long', 'look-ups', 'tied', 'over layers, bfloat16'),
  'vmap': ('rests of a scale', 'square', 'experts', 'wide scale', 'scale of many axes', 'with bias, bfloat16'),
}  # fmt: skip


def worst(climb: Climb, enough: float, seconds=SECONDS):
  """The best of a climb that ends early once it has enough."""
  climb.generation()  # compiles
  end = time.process_time() + seconds
  while climb.best.score <= enough and time.process_time() < end:
    climb.generation()
  return climb.best


def check(case, settings, rng, in_company=False, at_least=0.5):
  allowed = search.allowed(in_company)
  found = worst(search.climb_of(case, settings, rng, in_company), allowed)
  genes = [decoded(genome) for genome in found.genome]
  assert found.score <= allowed, f'{found.score} times clip_norm by {genes}'
  # A search that finds nothing that is clipped has not searched.
  assert found.score >= at_least


@pytest.mark.parametrize(
  'strategy, case', [(strategy, case) for strategy, cases in SEARCHED.items() for case in cases]
)
def test_no_example_that_a_search_finds_contributes_more_than_clip_norm(rng, strategy, case):
  # Rests are mostly nothing: that they are found to be is all there is to find.
  at_least = 0 if CASES[case].rest else 0.5
  check(case, Settings(strategy), rng, at_least=at_least)


@pytest.mark.parametrize('case', ['few tokens', 'long over time', 'experts'])
def test_nor_does_it_in_company(rng, case):
  check(case, Settings('bookkeeping'), rng, in_company=True)


@pytest.mark.parametrize('label', [label for label in SETTINGS if label != 'clip 1'])
def test_nor_by_other_clip_functions_and_at_the_ends_of_what_clip_norm_may_be(rng, label):
  # No gradient is as large as 1e30.
  at_least = 0.5 if SETTINGS[label].get('clip_norm') != 1e30 else 0
  check('few tokens', Settings('bookkeeping', **SETTINGS[label]), rng, at_least=at_least)


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_nor_where_automatic_divides_by_next_to_nothing(rng, strategy):
  smallest = [label for label in SETTINGS if 'gamma' in label][-1]
  check('wide scale', Settings(strategy, **SETTINGS[smallest]), rng)


@pytest.mark.parametrize('strategy', privacy.CLIPPING_STRATEGIES)
def test_nor_where_a_gradient_is_zero_but_for_how_it_is_rounded(strategy):
  # Found by climb_of_programs: two passes that round differently see zero and 4,900 C.
  fourth = (4.5 + 1) / 8
  genome = dict(first=fourth, second=0, third=fourth, turns=0.6, size=1, fed=0)
  loss = search.program_of([genome[name] for name in search.PROGRAM])
  assert search.contribution_of(loss, strategy) <= search.allowed()


# --- That the search finds what is there: clipping that has been in use, and is not right.


def gram_clipping(bound_of):
  """What an example of 'wide' adds, clipped by a norm from Gram matrices in float32.

  `bound_of(tokens)`: what is said of its rounding, in roundoffs of (sum |x_t| |g_t|)^2.
  """

  @jax.jit
  @jax.vmap
  def factor(x, g):
    dot = lambda a, b: jnp.dot(a, b, precision='highest')
    squared = jnp.sum(dot(x, x.T) * dot(g, g.T))
    reach = jnp.sum(jnp.linalg.norm(x, axis=1) * jnp.linalg.norm(g, axis=1))
    bound = jnp.sqrt(jnp.maximum(squared, 0) + bound_of(len(x)) * UNIT * reach**2)
    return jnp.where(jnp.isfinite(bound), 1 / jnp.maximum(bound, 1), 0)

  def score(genomes):
    xs, gs = (np.stack(ys) for ys in zip(*[CASES['wide'].example(g)['w'][0] for g in genomes]))
    gram = lambda ys: np.float64(ys) @ np.float64(np.swapaxes(ys, 1, 2))
    with np.errstate(all='ignore'):  # past the largest float: clipped to nothing
      norms = np.sqrt(np.maximum(np.sum(gram(xs) * gram(gs), axis=(1, 2)), 0))
    factors = np.asarray(factor(xs, gs))
    return np.where(factors > 0, norms * factors, 0)

  return score


@pytest.mark.parametrize(
  'bound_of', [lambda tokens: 0, lambda tokens: 1 + 8 / tokens], ids=['none', 'as if random']
)
def test_it_finds_what_a_gram_matrix_loses(rng, bound_of):
  climb = Climb(gram_clipping(bound_of), (1, len(GENES)), rng, size=8)
  assert worst(climb, 1.01, seconds=60).score > 1.01


# --- Sums of a whole logical batch.

CONSTANT = 4.0  # of the second term of what a sum may be off by


@pytest.mark.parametrize('count', [4, 64, 1024])
def test_no_sequence_is_summed_worse_than_by_two_floats(rng, count):
  found = worst(search.climb_of_sums(count, CONSTANT, rng), 1.0)
  terms = search.terms_of(found.genome, count)
  assert found.score <= 1, f'{found.score} times what it may be off, by {terms[:8]}'


def kahan(genomes, count=4):
  """The same for a sum that keeps what an addition lost, but not what the next lost of that."""
  terms = np.stack([search.terms_of(genome, count) for genome in genomes])
  total = lost = np.zeros(len(terms), np.float32)
  for term in terms.T:
    corrected = term - lost
    new = total + corrected
    total, lost = new, (new - total) - corrected
  return search.errors_of(terms, total, CONSTANT)


def test_it_finds_what_a_compensated_sum_loses(rng):
  climb = Climb(kahan, (len(search.TERMS),), rng, size=64)
  assert worst(climb, 100, seconds=10).score > 100


# --- Without clipping.


def test_a_plain_sum_is_finite_whatever_is_added(rng):
  case = CASES['few tokens']

  @jax.jit
  def summed(batch, mask):
    return privacy.plain_sum(case.loss, case.zeros(), batch, mask).sum['w']

  huge, tried = 0, 40
  for _ in range(tried):
    examples = [case.example(rng.random((1, len(GENES)))) for _ in range(4)]
    batch = jax.tree.map(lambda *ys: np.stack(ys), *examples)
    x, g = batch['w'][0]
    g[rng.integers(4)] *= np.float32(rng.choice([1, 1, np.nan, np.inf, 1e30]))
    mask = rng.random(4) < 0.6
    actual = np.asarray(summed(batch, mask))
    with np.errstate(over='ignore', invalid='ignore'):
      each = [x[i].T @ g[i] for i in range(4)]
      usable = [i for i in np.flatnonzero(mask) if np.isfinite(each[i]).all()]
      exact = sum((np.float64(x[i]).T @ g[i] for i in usable), np.zeros((24, 20)))
    assert np.isfinite(actual).all()
    huge += len(usable) < mask.sum()
    if np.abs(exact).max() < 1e38:
      length = lambda y: np.linalg.norm(np.float64(y))
      size = sum(length(x[i]) * length(g[i]) for i in usable)
      # Numbers below the smallest may count as zeros.
      tiny = np.finfo(np.float32).tiny
      lost = tiny * sum(y.size * (1 + length(y)) for i in usable for y in (x[i], g[i]))
      assert np.linalg.norm(actual - exact) <= 1e-4 * size + lost
  assert 0 < huge < tried


# --- The command.


def test_the_command_prints_the_worst_it_found_and_how_to_have_it_again(capsys):
  search.main(['--strategy=vmap', '--minutes=0.03', '--cases=few tokens/clip 1', '--seed=3'])
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  again = search.contributions(found['case'], Settings('vmap'), [np.array(found['genome'])])
  assert found['strategy'] == 'vmap' and found['largest'] == again[0] > 0.5
