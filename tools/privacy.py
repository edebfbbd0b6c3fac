"""Prints what a config guarantees, without its data: epsilon by each accountant, and more.

    python -m tools.privacy --config=FILE[:argument] [--config.key=value ...]

One JSON line. `dataset_size` is the config's, or else that of its source. An accountant that
does not cover the run, or gives no finite bound, is null. `attack_tpr` is the most that an attack's
true-positive rate can be at a false-positive rate, `gdp_mu` the mu of Gaussian differential privacy
(null where none is known), `delta_allows` a word of caution about a large delta. A simulation
(`privacy.simulation_divisor`) has no epsilon; `simulates` holds the figures of the run that it
simulates, and is null for a run of its own.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import json
from typing import Any

from dpcap import command_line, privacy
from dpcap.training import build

_CONFIG = command_line.define_config()


def main() -> None:
  """Reads the config, calibrates or accounts, prints."""
  config = command_line.load_config(_CONFIG)
  size = config.data.dataset_size or len(build.make_source(config, config.data.source))
  plan = build.make_plan(config, size)
  print(json.dumps(figures(plan) | {'simulates': plan.simulated and figures(plan.simulated)}))


def figures(plan: privacy.PrivacyPlan) -> dict[str, Any]:
  """The figures of a whole run, JSON-ready."""
  return {
    **{
      f'epsilon_{name}': privacy.accounting.finite_or_none(plan.epsilon(accountant=name))
      for name in privacy.ACCOUNTANTS
    },
    'delta': plan.delta,
    'delta_allows': privacy.statement.delta_allows(plan.delta, plan.dataset_size),
    **privacy.statement.attack_figures(plan, plan.steps if plan.private else None),
    'noise_multiplier': plan.noise_multiplier,
    'sampling_probability': plan.sampling_probability,
    'steps': plan.steps,
    'expected_batch_size': plan.expected_batch_size,
    'dataset_size': plan.dataset_size,
  }


if __name__ == '__main__':
  command_line.run(main)
