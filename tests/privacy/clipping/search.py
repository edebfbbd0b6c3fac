"""A search for examples that contribute more than they may, and for sums that lose more.

  python -m tests.privacy.clipping.search --strategy=bookkeeping --minutes=60 --seed=1

climbs from random starts in every case (or in those that --cases matches), prints each new
record, and in the end one JSON line per strategy: the largest contribution found, in units
of clip_norm, and the example that gave it. Without --strategy it searches all of them, and
running sums too. The exit code is 1 if anything was above what is claimed.

An example is written down as a few dozen numbers (`adversaries.py`). A genetic search climbs
on what `clipped_sum` really added up, for a population of examples at a time.
"""

import argparse
import contextlib
import fnmatch
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpcap import privacy
from dpcap.privacy import clipping
from tests.privacy.clipping.adversaries import CASES, GENES, Case, choose, decoded, optional
from tests.privacy.clipping.compiler_options import AT_LEISURE

# --- What an example contributes.

COMPANY = 3
# Sums are rounded relative to themselves: in units of clip_norm, beside COMPANY examples.
ROUNDED = 1e-6 * (COMPANY + 1)


class Settings(NamedTuple):
  """How `clipped_sum` is called."""

  strategy: str
  clip_norm: float = 1.0
  clip_function: Any = privacy.Clip()


@functools.cache
def _compiled(case_name: str, settings: Settings, in_company: bool):
  """(population of examples, company) -> sums: (population, ...), or with and without it."""
  case = CASES[case_name]

  def summed(batch, mask):
    return privacy.clipped_sum(
      case.loss,
      case.zeros(),
      batch,
      mask,
      clip_norm=settings.clip_norm,
      clip_function=settings.clip_function,
      strategy=settings.strategy,
    ).sum

  # lax.map, not vmap: what is measured is the program as it is, on one example after another.
  def alone(population, company):
    del company
    # Twice, one of them masked: over a batch of one XLA computes less again.
    twice = lambda y: jnp.stack([y, y])
    one = lambda example: summed(jax.tree.map(twice, example), jnp.array([True, False]))
    return lax.map(one, population)

  def beside(population, company):
    def one(example):
      place = lambda y, ys: jnp.concatenate([ys[:1], y[None], ys[1:]])
      batch = jax.tree.map(place, example, company)
      masks = jnp.stack([jnp.ones(COMPANY + 1, bool), jnp.arange(COMPANY + 1) != 1])
      return lax.map(lambda mask: summed(batch, mask), masks)

    return lax.map(one, population)

  return jax.jit(beside if in_company else alone, compiler_options=AT_LEISURE)


def _norms(tree) -> np.ndarray:
  """L2 norms (population,) over all leaves, in float64."""
  squares = [np.sum(np.float64(y).reshape(len(y), -1) ** 2, axis=1) for y in jax.tree.leaves(tree)]
  return np.sqrt(sum(squares))


def company_of(case: Case, clip_norm: float):
  """Ordinary examples, some of which are clipped."""
  rng = np.random.default_rng(1)

  def ordinary(use):
    normal = lambda shape: np.float32(rng.normal(size=(COMPANY, *shape)))
    x = rng.integers(use.x[1], size=(COMPANY, use.x[0])).astype(np.int32)
    g = normal(use.y) * np.float32(clip_norm)
    if case.rest:
      g = normal(use.y[1:]), normal(use.y[1:]), g
    return (x if use.rows else normal(use.x)), g

  return {name: [ordinary(use) for use in uses] for name, uses in case.uses.items()}


def contributions(case_name: str, settings: Settings, genomes, in_company=False) -> np.ndarray:
  """What each of a population of examples adds to the sum, in units of clip_norm.

  NaN or infinite where the sum is.
  """
  case = CASES[case_name]
  examples = [case.example(genome) for genome in genomes]
  population = jax.tree.map(lambda *ys: np.stack(ys), *examples)
  company = company_of(case, settings.clip_norm) if in_company else None
  sums = jax.device_get(_compiled(case_name, settings, in_company)(population, company))
  if in_company:
    sums = jax.tree.map(lambda y: np.float64(y[:, 0]) - np.float64(y[:, 1]), sums)
  return _norms(sums) / settings.clip_norm


# --- The search itself.


class Found(NamedTuple):
  """The best so far of one climb: a score, and the genome that has it."""

  score: float
  genome: np.ndarray


class Climb:
  """A genetic search for genomes of a high score, in [0, 1] to the power of `shape`.

  Half of a generation are changes of good genomes, a quarter mix two of them, the rest are
  new. Where nothing improved for `patience` generations, it starts again.
  """

  def __init__(self, score: Callable, shape: tuple[int, ...], rng, size=32, patience=25):
    self._score, self._shape, self._rng = score, shape, rng
    self._size, self._patience = size, patience
    self.best = Found(-math.inf, np.zeros(shape))
    self.generations = 0
    self._restart()

  def _restart(self):
    self._good: list[Found] = []
    self._idle = 0

  def _parent(self):
    drawn = self._rng.integers(len(self._good), size=2)
    return self._good[min(drawn)].genome

  def _child(self):
    rng, kind = self._rng, self._rng.random()
    fresh = rng.random(self._shape)
    if not self._good or kind < 0.2:
      return fresh
    child = self._parent()
    if kind < 0.45:
      child = np.where(rng.random(self._shape) < 0.5, child, self._parent())
    few = rng.random(self._shape) < rng.choice([1.5, 4]) / child.size
    step = rng.normal(size=self._shape) * 10 ** -rng.uniform(0.5, 5)
    changed = np.where(rng.random(self._shape) < 0.5, fresh, np.clip(child + step, 0, 1))
    return np.where(few, changed, child)

  def generation(self) -> Found:
    """One more; returns the best of all."""
    genomes = [self._child() for _ in range(self._size)]
    scores = self._score(genomes)
    # What is no number is the worst that can come out.
    scores = np.where(np.isnan(scores), np.inf, scores)
    before = self._good[0].score if self._good else -math.inf
    found = [Found(float(s), g) for s, g in zip(scores, genomes, strict=True)]
    # One of each score: copies would crowd out the others.
    distinct = {f.score: f for f in self._good + found}
    self._good = sorted(distinct.values(), key=lambda f: -f.score)[:16]
    self._idle = 0 if self._good[0].score > before else self._idle + 1
    if self._good[0].score > self.best.score:
      self.best = self._good[0]
    if self._idle >= self._patience:
      self._restart()
    self.generations += 1
    return self.best


def climb_of(case_name: str, settings: Settings, rng, in_company=False, size=32) -> Climb:
  """For examples that contribute more than clip_norm."""
  score = lambda genomes: contributions(case_name, settings, genomes, in_company)
  return Climb(score, (len(CASES[case_name].uses), len(GENES)), rng, size)


def allowed(in_company=False) -> float:
  """What a contribution may be, in units of clip_norm."""
  return 1 + clipping.ROUNDING_MARGIN + (ROUNDED if in_company else 0)


# --- Programs: what is computed twice may be rounded in two ways.

# Pairs of what is the same number, to the last bit, for c = 2 a and d = b / 2; times y.
SAME = (
  lambda y, a, b, c, d: (y * a * b, y * c * d),
  lambda y, a, b, c, d: (y * (a * b * b), y * (a * b * d) * 2),
  lambda y, a, b, c, d: (y * (a * b * a), y * (c * b * a) * 0.5),
  lambda y, a, b, c, d: (y * (a * a * a), y * (c * a * a) * 0.5),
  lambda y, a, b, c, d: ((y * a) * (b * b), (y * c) * (d * b)),
  lambda y, a, b, c, d: (jnp.sin(y) * a * b, y * (d * c)),
  lambda y, a, b, c, d: (y * a + y * b, y * (c * 0.5) + y * d * 2),
)
PROGRAM = ('first', 'second', 'third', 'turns', 'size', 'fed')


def program_of(genome):
  """A loss(w, example) of differences that are zero, but for rounding, from genes (PROGRAM,).

  They are the gradients of a product's output or, `fed`, its inputs. A compiler that makes one
  instruction of a product and a sum here, and not where the same is computed again, makes two
  numbers of it that differ by as much as they are.
  """
  gene = dict(zip(PROGRAM, map(float, genome), strict=True))
  turns = int(gene['turns'] * 8)
  pairs = [choose(gene[name], (None, *SAME)) for name in PROGRAM[:3]]
  size = choose(gene['size'], (1.0, 1e6, 3e9))

  def loss(w, e):
    abcd = [e[name] for name in 'abcd']
    y = e['one'] * jnp.ones_like(e['a']) if gene['fed'] > 0.7 else e['x'] @ w
    total = 0.0
    for i, pair in enumerate(pairs):
      if pair is not None:
        u, v = pair(y, *abcd)
        u, v = (v, u) if turns >> i & 1 else (u, v)
        total += u - v if gene['fed'] > 0.7 else jnp.sum(u) - jnp.sum(v)
    total = size * total
    return jnp.sum((total @ w) * e['x']) if gene['fed'] > 0.7 else total + 0 * jnp.sum(y)

  return loss


def contribution_of(loss, strategy: str) -> float:
  """The largest that some examples add to the sum of a loss of `program_of`, clip_norm 1."""
  summed = jax.jit(
    lambda w, batch: privacy.clipped_sum(loss, w, batch, clip_norm=1.0, strategy=strategy).sum,
    compiler_options=AT_LEISURE,
  )
  largest = 0.0
  for seed in range(4):
    a, b, x = np.float32(np.random.default_rng(seed).normal(size=(3, 1, 40, 8)))
    batch = {'a': a, 'b': b, 'c': 2 * a, 'd': b / 2, 'x': x, 'one': np.ones(1, np.float32)}
    largest = np.maximum(largest, _norms([np.asarray(summed(jnp.zeros((8, 8)), batch))[None]])[0])
  return float(largest)


def climb_of_programs(strategy: str, rng) -> Climb:
  """For losses by which an example contributes more; each is compiled, which takes a second."""
  score = lambda genomes: [contribution_of(program_of(genome), strategy) for genome in genomes]
  return Climb(score, (len(PROGRAM),), rng, size=4)


# --- Running sums.

TERMS = ('seed', 'sizes', 'spread', 'pattern', 'signs', 'share', 'close', 'repeat')


def terms_of(genome, count: int) -> np.ndarray:
  """A sequence (count,) in float32 from genes (TERMS,)."""
  gene = dict(zip(TERMS, map(float, genome), strict=True))
  rng = np.random.default_rng(int(gene['seed'] * 2**32))
  spread = 10 ** (gene['spread'] * 16)
  steps = np.arange(count)
  pattern = choose(gene['pattern'], ('random', 'two sizes', 'up', 'down', 'up and down', 'peak'))
  height = {
    'random': lambda: rng.random(count),
    'two sizes': lambda: (rng.random(count) < gene['share']).astype(float),
    'up': lambda: steps / count,
    'down': lambda: 1 - steps / count,
    'up and down': lambda: 1 - np.abs(2 * steps / count - 1),
    'peak': lambda: (steps == int(gene['share'] * count)).astype(float),
  }[pattern]()
  terms = spread**height * np.where(gene['repeat'] < 0.5, 1, 1 + rng.random(count))
  signs = choose(gene['signs'], ('plus', 'in turn', 'random', 'mirrored', 'closed'))
  if signs == 'in turn':
    terms *= 1 - 2 * (steps % 2)
  if signs == 'random':
    terms *= rng.choice([-1, 1], count)
  if signs == 'mirrored':  # what comes first is taken away again
    half = count // 2
    terms[count - half :] = -terms[:half]
  terms = np.float32(terms * 10 ** (8 * gene['sizes'] - 4))
  if signs == 'closed':  # all of the rest is taken away, up to a rest of its own
    terms[-1] = np.float32(-math.fsum(terms[:-1]) * (1 + optional(gene['close'], -12, -2)))
  return terms


@jax.jit
def _running_sums(terms):
  """Of sequences (population, count)."""
  add = lambda total, term: (total.add(term), None)
  return lax.scan(add, privacy.running_sum(terms[:, 0]), terms.T)[0].value()


UNIT = 2.0**-24


def errors_of(terms, sums, constant: float) -> np.ndarray:
  """How often what it may be an error is: u |sum| + constant n^2 u^2 sum |terms|.

  Of float32 sums (population,) of terms (population, n).
  """
  exact = np.array([math.fsum(t) for t in terms])
  total = np.sum(np.abs(np.float64(terms)), axis=1)
  within = UNIT * np.abs(exact) + constant * terms.shape[1] ** 2 * UNIT**2 * total
  return np.abs(np.float64(sums) - exact) / np.maximum(within, 1e-300)


def climb_of_sums(count: int, constant: float, rng) -> Climb:
  """For sequences whose sum is further off than it may be (score > 1)."""

  def score(genomes):
    terms = np.stack([terms_of(genome, count) for genome in genomes])
    return errors_of(terms, _running_sums(terms), constant)

  return Climb(score, (len(TERMS),), rng, 256)


# --- The command.


class Job(NamedTuple):
  """A climb, what it climbs and what its score may be."""

  about: dict[str, Any]
  climb: Climb
  allowed: float
  describe: Callable[[np.ndarray], Any]


def _automatic(gamma):
  """Settings, or None where so small a gamma is refused."""
  with contextlib.suppress(ValueError):
    return dict(clip_function=privacy.Automatic(gamma))


# Beside clip_norm 1: the ends of what is accepted, and a function that divides by little.
SETTINGS = {
  'clip 1': {},
  'clip 1e-12': dict(clip_norm=1e-12),
  'clip 1e30': dict(clip_norm=1e30),
  'automatic': dict(clip_function=privacy.Automatic()),
  **{f'automatic, gamma {gamma}': _automatic(gamma) for gamma in (1e-10, 1e-15, 1e-20, 1e-30)},
  'automatic, clip 1e-12': dict(clip_norm=1e-12, clip_function=privacy.Automatic()),
  'automatic, clip 1e30': dict(clip_norm=1e30, clip_function=privacy.Automatic()),
}
SETTINGS = {label: settings for label, settings in SETTINGS.items() if settings is not None}


def _jobs(strategies, pattern, rng):
  """Each case with each of SETTINGS, alone and in company; compiled when their turn comes."""
  for name in CASES:
    for label, settings in SETTINGS.items():
      for in_company in (False, True):
        # The ends and the company are searched where one generation takes little.
        if (label != 'clip 1' or in_company) and CASES[name].entries() > 10_000:
          continue
        for strategy in strategies:
          about = dict(strategy=strategy, case=name, settings=label, in_company=in_company)
          title = f'{name}/{label}' + ('/in company' if in_company else '')
          if not fnmatch.fnmatch(title, pattern):
            continue
          size = 32 if CASES[name].entries() < 10_000 else 8
          of = Settings(strategy, **settings)
          climb = climb_of(name, of, rng, in_company, size)
          describe = lambda genome, name=name: dict(
            zip(CASES[name].uses, map(decoded, genome), strict=True)
          )
          yield Job(about, climb, allowed(in_company), describe)


def _program_jobs(strategies, pattern, rng):
  for strategy in strategies:
    if fnmatch.fnmatch('programs/clip 1', pattern):
      describe = lambda genome: dict(zip(PROGRAM, map(float, genome), strict=True))
      about = dict(strategy=strategy, case='programs')
      yield Job(about, climb_of_programs(strategy, rng), allowed(), describe)


def _sum_jobs(constant, rng):
  for count in (4, 64, 1024):
    about = dict(strategy='running_sum', case=f'{count} terms', constant=constant)
    describe = lambda genome, count=count: [float(t) for t in terms_of(genome, count)[:16]]
    yield Job(about, climb_of_sums(count, constant, rng), 1.0, describe)


def _is_record(job: Job, before: float) -> bool:
  """A new one that says something: above what is allowed, and by a tenth more."""
  score = job.climb.best.score
  return score > job.allowed and (before <= job.allowed or score > before * 1.1)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  strategies = (*privacy.CLIPPING_STRATEGIES, 'running_sum')
  parser.add_argument('--strategy', action='append', choices=strategies, help='all by default')
  parser.add_argument('--minutes', type=float, default=10)
  parser.add_argument('--seed', type=int, default=None, help='fresh by default')
  parser.add_argument('--cases', default='*', help='pattern of CASE/SETTINGS[/in company]')
  parser.add_argument('--constant', type=float, default=4.0, help='of the error of running sums')
  args = parser.parse_args(argv)
  chosen = args.strategy or strategies
  seed = args.seed if args.seed is not None else int(np.random.SeedSequence().entropy % 2**32)
  rng = np.random.default_rng(seed)
  print(f'seed {seed}', flush=True)
  of_clipping = [s for s in chosen if s != 'running_sum']
  jobs = [*_jobs(of_clipping, args.cases, rng), *_program_jobs(of_clipping, args.cases, rng)]
  jobs += list(_sum_jobs(args.constant, rng)) if 'running_sum' in chosen else []
  # What a run would be set to comes first.
  ordinary = lambda about: about.get('settings', 'clip 1') == 'clip 1'
  jobs.sort(key=lambda job: (not ordinary(job.about), job.about.get('in_company', False)))
  start = time.monotonic()
  left = lambda: args.minutes * 60 - (time.monotonic() - start)
  turn = 0
  while left() > 0 and jobs:
    # Each case some generations in turn: early ones come around again.
    for job in jobs[: 4 + turn] if turn < len(jobs) else jobs:
      if left() <= 0:
        break
      before, ends = job.climb.best.score, time.monotonic() + 4
      job.climb.generation()  # compiles
      while job.climb.generations % 20 and time.monotonic() < ends:
        job.climb.generation()
      if _is_record(job, before):
        found = f'{job.climb.best.score:.7g} after {job.climb.generations} generations'
        print(f'{args.minutes * 60 - left():6.0f} s  {json.dumps(job.about)}: {found}', flush=True)
    turn += max(4, turn)
  worst = {}
  for job in jobs:
    if job.climb.generations:
      worst.setdefault(job.about['strategy'], []).append(job)
  for strategy, of_strategy in worst.items():
    # By how far it is above: in company more is allowed.
    job = max(of_strategy, key=lambda job: job.climb.best.score / job.allowed)
    above = sorted({j.about['case'] for j in of_strategy if j.climb.best.score > j.allowed})
    line = dict(
      strategy=strategy,
      # JSON has no infinity.
      largest=job.climb.best.score if math.isfinite(job.climb.best.score) else 'inf',
      allowed=job.allowed,
      seed=seed,
      tried=sum(j.climb.generations for j in of_strategy),
      cases_above=above,
      **{k: v for k, v in job.about.items() if k != 'strategy'},
      example=job.describe(job.climb.best.genome),
      # For `contributions`, which gives the same again.
      genome=np.asarray(job.climb.best.genome).tolist(),
    )
    print(json.dumps(line), flush=True)
  return int(any(j.climb.best.score > j.allowed for js in worst.values() for j in js))


if __name__ == '__main__':
  sys.exit(main())
