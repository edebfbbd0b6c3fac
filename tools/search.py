"""Plans what a private run learns: measures it without spending privacy, fits a law, picks a plan.

    python -m tools.search --workdir=DIR [--config=configs/scenes.py:dpcap] [--sizes=micro,demo]
        [--ratios=3e-4,1e-3,3e-3] [--batch=64] [--steps=400]
        [--epsilon=8 --dataset_size=1000000 --compute=1e14 [--delta=1e-6] [--check[=COMPUTE]]]
        [--public_data] [--config.key=value ...]
    python -m tools.search --workdir=DIR --sizes=demo --ratios=1e-3
        --sweep=optimizer.learning_rate=1e-3,3e-3,1e-2 [--sweep=privacy.clip_norm=0.1,1] ...

The loss of a run follows from model size, steps and the noise-to-batch ratio sigma / B (McKenna
et al. 2025, arXiv 2501.18914). So small batches with as little noise simulate runs with large
ones (`privacy.simulation_divisor`), on generated data, or on data that you say are public. The
learning rate is constant after the warm-up: the loss on the way is then that of a run that ends
there, and one run gives all steps up to its own. It is the training loss, averaged over stretches
of steps; a simulation draws no more images than there are, nearly every one is new to it, and so
it is held-out loss, of any model and at no cost. `tools/search_parts/law.py` states the law.

With epsilon, N (--dataset_size) and --compute (floating-point operations of all gradients), the
best plans within them: batch, steps, size, sigma by PLD, predicted loss. Plans up to 4 times
outside of what was measured are marked, others left out. --check trains the best one for real at
its epsilon, on generated data of that N, or the best within COMPUTE. --sweep trains simulations
for each choice of any keys.

DIR/search.md, .json and .png (or sweep.*) hold what was found, DIR/runs the runs. SIGTERM stops
with status 143, and the same command goes on; runs that are done are not done again. The last
line on stdout is JSON: {"title", "runs": [{"size", "ratio", "loss", "predicted",
"sampling_share", "why"}], "law", "errors", "budget", "plans": [{"size", "batch", "steps",
"noise_multiplier", "ratio", "loss", "compute", "outside"}], "as_good": how many of these the law
does not tell from the best, "cheapest" of them, "said", "check": {"plan", "predicted",
"measured", "error", "error_along"}}, null where not asked for; of a sweep {"title", "size",
"ratio", "steps", "sweep": [{"values", "loss", "why"}]}.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import dataclasses
import datetime
import json
import sys

from absl import logging

from tools.arguments import program
from tools.runs import Runs, provenance, say
from tools.search_parts import law, measuring, output, planner
from tools.search_parts.options import Options, parse


@program
def main(argv: list[str] | None) -> None:
  """Does what the arguments ask for."""
  options = parse(argv, __doc__)
  found = sweep(options) if options.choices else search(options)
  print(json.dumps(found, allow_nan=False), flush=True)


def search(options: Options) -> dict:
  """Measures, fits and plans; writes the files and returns what the last line says.

  Raises:
    UserError: if the runs do not determine a law, or nothing within the budget is near them.
  """
  runs = Runs(options.workdir)
  experiment = options.experiment
  measured = measuring.simulate(runs, experiment, options.sizes, options.ratios)
  readings = [r for run in measured.values() if not isinstance(run, str) for r in run]
  for (size, ratio), run in measured.items():
    if isinstance(run, str):
      say(f'warning: size {size} at sigma / B = {ratio:g}: {run}')
  fitted, errors = law.fit(readings)
  costs = {size: measuring.cost(experiment, size) for size in fitted.scale}
  found = {
    'title': f'What {experiment.config} learns, by size, steps and noise',
    'runs': [_run(*at, run, fitted, costs, experiment.batch) for at, run in measured.items()],
    'law': dataclasses.asdict(fitted),
    'errors': dataclasses.asdict(errors),
    **dict.fromkeys(('budget', 'plans', 'as_good', 'cheapest', 'said', 'check')),
  }
  if options.budget:
    plans = _plan(fitted, costs, options.budget)
    found |= _planned(options.budget, plans, errors.left_out)
    if options.check_compute:
      best = plans[0]
      if best.compute > options.check_compute:
        smaller = dataclasses.replace(options.budget, compute=options.check_compute)
        best = _plan(fitted, costs, smaller)[0]
      found['check'] = measuring.check(runs, experiment, fitted, best, options.budget)
  _write(options, runs, 'search', found)
  output.draw_law(options.workdir / 'search.png', fitted, readings)
  return found


def sweep(options: Options) -> dict:
  """Trains for each choice of keys; writes the files and returns what the last line says."""
  runs, (size,), (ratio,) = Runs(options.workdir), options.sizes, options.ratios
  rows = measuring.sweep(runs, options.experiment, size, ratio, options.choices)
  found = {
    'title': f'A sweep of {", ".join(options.choices[0])} in {options.experiment.config}',
    'size': size,
    'ratio': ratio,
    'steps': options.experiment.steps,
    'sweep': rows,
  }
  _write(options, runs, 'sweep', found)
  output.draw_sweep(options.workdir / 'sweep.png', rows)
  return found


def _run(size, ratio, run, fitted, costs, batch):
  row = {'size': size, 'ratio': ratio, 'loss': None, 'predicted': None, 'sampling_share': None}
  if isinstance(run, str):
    return row | {'why': run}
  last = run[-1]
  return row | {
    'loss': last.loss,
    'predicted': fitted.loss(size, last.step, ratio),
    'sampling_share': measuring.sampling_share(ratio, batch, costs[size].parameters),
    'why': None,
  }


def _plan(fitted, costs, budget):
  flops = {size: cost.flops for size, cost in costs.items()}
  return planner.best(fitted, flops, budget, planner.calibrated(budget))


def _planned(budget, plans, error):
  alike = planner.as_good(plans, error)
  best, cheapest = plans[0], alike[0]
  said = (
    f'Best: size {best.size}, batch {best.batch:,}, {best.steps:,} steps, sigma'
    f' {best.noise_multiplier:.4f}.'
  )
  if best.outside > 1:
    said += f' It is {best.outside:.2g} times outside of what was measured: measure there first.'
  if len(alike) > 1:
    said += (
      f" The optimum is flat: {len(alike)} of these {len(plans)} are within the law's error"
      f' ({error:.1%}) of it'
    )
    said += '.' if cheapest == best else (
      f'; the cheapest of them, size {cheapest.size}, batch {cheapest.batch:,},'
      f' {cheapest.steps:,} steps, takes {cheapest.compute / best.compute:.0%} of the operations.'
    )
  return {
    'budget': dataclasses.asdict(budget),
    'plans': [dataclasses.asdict(plan) for plan in plans],
    'as_good': len(alike),
    'cheapest': dataclasses.asdict(cheapest),
    'said': said,
  }


def _write(options, runs, name, found):
  now = f'{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC'
  output.write(options.workdir, name, found, provenance(now, runs.commands))


if __name__ == '__main__':
  logging.set_verbosity(logging.ERROR)
  sys.exit(main())
