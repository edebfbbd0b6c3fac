"""The runs of a search: simulated over sizes and noise-to-batch ratios, swept, or for real."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from dpcap import data
from dpcap.errors import UserError
from dpcap.training import build
from tools.plan_parts import memory
from tools.runs import Runs, say
from tools.search_parts import law, readings, simulation
from tools.search_parts.planner import Budget, Plan


class Cost(NamedTuple):
  """What a model takes.

  Attributes:
    flops: floating-point operations for the gradient of one image, as XLA counts them.
    parameters: how many are trained.
  """

  flops: float
  parameters: int


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What all runs of a search have in common.

  Attributes:
    config: value of --config.
    overrides: its keys that are changed in every run, key -> value.
    batch: images of a simulated step.
    steps: of a simulated run.
    public: whether the data are declared to be public.
  """

  config: str
  overrides: Mapping[str, Any]
  batch: int
  steps: int
  public: bool = False


def simulate(
  runs: Runs, experiment: Experiment, sizes: Sequence[str], ratios: Sequence[float]
) -> dict[tuple[str, float], list[law.Reading] | str]:
  """The readings of a run for each size and ratio, or why it has none.

  Raises:
    UserError: before any run starts, if a config, or its data, is refused.
  """
  jobs = {
    (size, ratio): _Job(ratio, _simulated(experiment, size, ratio))
    for size in sizes
    for ratio in ratios
  }
  return _train_all(runs, experiment, jobs)


def sweep(
  runs: Runs,
  experiment: Experiment,
  size: str,
  ratio: float,
  choices: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
  """The loss at the end of a simulated run for each choice of keys, the best first.

  Returns:
    {'values': {key: value}, 'loss', 'why' (there is no loss)} of each.

  Raises:
    UserError: as simulate.
  """
  common = _simulated(experiment, size, ratio)
  jobs = {place: _Job(ratio, common | choice) for place, choice in enumerate(choices)}
  rows = []
  for place, found in _train_all(runs, experiment, jobs).items():
    failed = isinstance(found, str)
    rows.append(
      {
        'values': dict(choices[place]),
        'loss': None if failed else found[-1].loss,
        'why': found if failed else None,
      }
    )
  return sorted(rows, key=lambda row: math.inf if row['loss'] is None else row['loss'])


def check(
  runs: Runs, experiment: Experiment, fitted: law.Law, plan: Plan, budget: Budget
) -> dict[str, Any]:
  """Trains a plan for real and compares its loss with the law's.

  Returns:
    {'plan', 'predicted', 'measured' (both at the end), 'error' (relative), 'error_along' (root
    mean square over the run)}.

  Raises:
    UserError: if the data have another N, or the run fails.
  """
  overrides = {
    'model.size': plan.size,
    'data.dataset_size': budget.dataset_size,
    **simulation.real(budget.epsilon, budget.delta, plan.batch, plan.steps),
  }
  config = simulation.make_config(experiment.config, experiment.overrides)
  if config.data.source.name in data.GENERATED:
    overrides['data.source.size'] = budget.dataset_size
  (found,) = _train_all(runs, experiment, {plan: _Job(plan.ratio, overrides)}).values()
  if isinstance(found, str):
    raise UserError(f'the run that checks the law: {found}')
  predicted = [fitted.loss(plan.size, reading.step, plan.ratio) for reading in found]
  errors = [math.log(reading.loss / loss) for reading, loss in zip(found, predicted)]
  return {
    'plan': dataclasses.asdict(plan),
    'predicted': predicted[-1],
    'measured': found[-1].loss,
    'error': found[-1].loss / predicted[-1] - 1,
    'error_along': math.sqrt(sum(error**2 for error in errors) / len(errors)),
  }


def cost(experiment: Experiment, size: str) -> Cost:
  """What a size of the experiment's model takes, from shapes alone."""
  overrides = {'model.size': size, **experiment.overrides}
  config = simulation.make_config(experiment.config, overrides)
  vocab_size = build.make_tokenizer(config).vocab_size
  _, state = memory.make_parts(config, vocab_size)
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  return Cost(memory.flops_per_example(config, vocab_size), parameters)


def sampling_share(ratio: float, batch: int, parameters: int) -> float:
  """The most of a gradient's variance that comes from the small batch instead of the noise.

  A simulation is right as far as this is small: the run that it simulates has a larger batch.
  Of the mean of `batch` gradients of norm C or less it is at most C^2 / batch, of the noise
  (r C)^2 for each parameter.
  """
  return 1 / (1 + ratio**2 * parameters * batch)


class _Job(NamedTuple):
  """A run: its noise-to-batch ratio, and the keys that are its own."""

  ratio: float
  overrides: Mapping[str, Any]


def _simulated(experiment, size, ratio):
  keys = simulation.simulated(ratio, experiment.batch, experiment.steps)
  return {'model.size': size, **keys}


def _train_all(runs, experiment, jobs):
  """Name of a job -> readings, or why there are none; all are checked before the first starts."""
  changed = {name: job.overrides | experiment.overrides for name, job in jobs.items()}
  configs = {
    name: simulation.make_config(experiment.config, overrides)
    for name, overrides in changed.items()
  }
  for config in configs.values():
    _check_data(config, experiment.public)
  found = {}
  with runs.stoppable():
    for number, (name, config) in enumerate(configs.items(), 1):
      folder = runs.folder(config)
      say(f'[{number}/{len(configs)}] {folder.name}')
      arguments = simulation.arguments(experiment.config, changed[name])
      command = ['python', '-m', 'dpcap.train', *arguments, f'--workdir={folder}']
      runs.note(command)
      say(f'  $ {runs.commands[-1]}')
      failed = None if runs.is_trained(config) else runs.start('training', command)
      found[name] = failed or _read(folder, config, jobs[name].ratio)
  return found


def _read(folder, config, ratio):
  try:
    return readings.read(folder, config.model.size, ratio, config.optimizer.warmup_steps)
  except UserError as e:
    return str(e)


def _check_data(config: ml_collections.ConfigDict, public: bool) -> None:
  """Refuses data that would be spent, or that a simulation sees more than once."""
  source = config.data.source.name
  if source not in data.GENERATED and not public:
    raise UserError(
      f'data.source.name is {source!r}; a search has no guarantee for what it trains on: it takes'
      f' generated data ({", ".join(data.GENERATED)}), or --public_data, by which you say that'
      ' these are public'
    )
  length, declared = _length(config), config.data.dataset_size
  if declared not in (None, length):
    raise UserError(f'data.dataset_size is {declared}; the source {source!r} has {length} records')
  divisor = config.privacy.simulation_divisor
  if divisor is None:
    return
  drawn = config.privacy.expected_batch_size // divisor * config.train.steps
  if drawn > length:
    raise UserError(
      f'a run of {drawn:,} images would see the {length:,} of the source more than once, and its'
      ' loss would no longer be that of new images; take fewer --steps, or a larger source'
    )


def _length(config: ml_collections.ConfigDict) -> int:
  return len(build.make_source(config, config.data.source))
