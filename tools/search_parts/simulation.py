"""Configs of the runs of a search: an experiment with some keys changed, simulated or for real."""

import ast
from collections.abc import Mapping
from typing import Any

import ml_collections

from dpcap import config as config_lib
from dpcap.errors import UserError
from tools import runs

Overrides = dict[str, Any]


def make_config(config: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The validated config that `--config=...` names, with keys changed.

  Raises:
    UserError: naming the file or the key, and what is allowed.
  """
  try:
    made = runs.load(config)
  except ImportError as e:
    raise UserError(f'--config is {config!r}; it must be configs/FILE.py[:argument] ({e})') from e
  made = made.copy_and_resolve_references()
  for key, value in overrides.items():
    *sections, name = key.split('.')
    section = made
    for part in sections:
      section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
    if not isinstance(section, ml_collections.ConfigDict) or name not in section:
      raise UserError(f'config.{key} is no key of {config}')
    try:
      section[name] = value
    except TypeError as e:
      raise UserError(f'config.{key} is {value!r}; it is of another type ({e})') from e
  config_lib.validate(made)
  return made


def arguments(config: str, overrides: Mapping[str, Any]) -> list[str]:
  """The same for the command line of a main program."""
  return [f'--config={config}', *(f'--config.{key}={value}' for key, value in overrides.items())]


def read_value(text: str) -> Any:
  """A value of a key, as the command line has it."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def simulated(ratio: float, batch: int, steps: int) -> Overrides:
  """Keys of a run of `batch` images a step whose gradients have the noise of `ratio` = sigma / B.

  It simulates the run with that ratio whose sigma is about one, or itself where its own sigma is
  larger. Neither changes what is trained, and there is no guarantee.
  """
  divisor = max(1, round(1 / (ratio * batch)))
  return {
    'privacy.epsilon': None,
    'privacy.noise_multiplier': ratio * divisor * batch,
    'privacy.expected_batch_size': divisor * batch,
    'privacy.simulation_divisor': divisor,
    'privacy.accountant': 'rdp',  # its epsilon is nobody's, and PLD takes longer than the run
    **_common(steps),
  }


def real(epsilon: float, delta: float, batch: int, steps: int) -> Overrides:
  """Keys of a run with a guarantee, the noise calibrated to its epsilon."""
  return {
    'privacy.epsilon': epsilon,
    'privacy.noise_multiplier': None,
    'privacy.delta': delta,
    'privacy.expected_batch_size': batch,
    'privacy.simulation_divisor': None,
    'privacy.accountant': 'pld',
    **_common(steps),
  }


def _common(steps):
  return {
    # The loss after any number of steps is then that of a run of so many.
    'optimizer.schedule': 'constant',
    'optimizer.decay_steps': None,
    'train.steps': steps,
    'train.log_every': 1,
    'train.checkpoint_every': steps,
    'train.evaluate_at': (),
    'train.diagnostics': True,
  }
