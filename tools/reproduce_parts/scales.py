"""At which scale a table is made: which config trains a run, and which evaluates it."""

from collections.abc import Sequence

from configs import dpcap
from tools.runs import load

# What a row's evaluations are called: `{data set}_{evaluator}`, as the config files have it.
DATASETS = {
  'paper': ('imagenet', 'places365', 'places205', 'inaturalist2021'),
  'cpu': ('count', 'shape', 'color', 'color_shape'),
  'smoke': ('count',),
}
SCALES = tuple(DATASETS)

# The paper's private runs start from the synthetic stage; scaled down, a table of its own asks
# whether that helps.
STAGE = {'paper': 'synthetic', 'cpu': 'scratch', 'smoke': 'scratch'}


def training_config(scale: str, run: str) -> str:
  """The value of --config that trains `run`, as 'configs/dpcap.py:base'."""
  file, _, words = run.partition(':')
  if scale == 'paper':
    return f'configs/{file}.py:{words}' if words else f'configs/{file}.py'
  return f'configs/scenes.py:{",".join(filter(None, (scale, file, words)))}'


def evaluation_configs(scale: str, run: str, evaluations: Sequence[str]) -> dict[str, list[str]]:
  """The values of --config that evaluate it, each with the names that it gives."""
  if scale != 'paper':
    config = ','.join([training_config(scale, run), *evaluations])
    return {config: list(evaluations)} if evaluations else {}
  configs = {}
  for name in evaluations:
    dataset = name.partition('_')[0]
    configs.setdefault(f'configs/evaluations.py:{dataset}@{run}', []).append(name)
  return configs


def stage_of(scale: str, run: str) -> str | None:
  """The run whose weights another one starts from; None: it starts from none."""
  if load(training_config(scale, run)).train.init is None:
    return None
  file, _, words = run.partition(':')
  size = next((word for word in words.split(',') if word in dpcap.SIZES), dpcap.SIZES[0])
  return f'textures:{size},for_{file}'
