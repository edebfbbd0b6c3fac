"""What the papers' runs guarantee, by each accountant, and the noise that their epsilon needs.

Nothing is trained: it is the same at every scale, of the full-sized runs.
"""

import dataclasses

from dpcap import privacy
from tools.reproduce_parts.study import Study
from tools.reproduce_parts.table import Finding, Measured, Row, Table, unmeasured

_ABSTRACT = 'epsilon 8: abstracts of Sander et al. 2024, Sander et al. 2023, and Yu et al. 2024'
_RUNS = (
  # name, run, the epsilon that is meant, and whether the paper says it
  ('DP-Cap', 'dpcap:base', 8.0, True),
  ('DP-Cap, epsilon 2', 'dpcap:epsilon2', 2.0, False),
  ('DP-Cap, epsilon 1', 'dpcap:epsilon1', 1.0, False),
  ('DP-Cap, batch 200,000', 'dpcap:batch200k', 8.0, False),
  ('DP-Cap, 10% of the pairs', 'dpcap:10percent', 8.0, False),
  ('DP-Cap, 1% of the pairs', 'dpcap:1percent', 8.0, False),
  ('ViP', 'vip:base', 8.0, True),
  ('ViP, released script', 'vip:script', 8.0, False),
  ('TAN on CIFAR-10', 'tan:cifar10', 8.0, False),
  ('TAN on ImageNet-1K', 'tan:imagenet', 8.0, True),
)


def _rows(scale):
  del scale
  return [
    Row(name, run, paper=epsilon if stated else None, source=_ABSTRACT if stated else None)
    for name, run, epsilon, stated in _RUNS
  ]


def _measure(study: Study, row: Row) -> Measured:
  """Epsilon of the run's own noise, and the noise that each accountant asks for the epsilon meant."""
  target = next(epsilon for name, _, epsilon, _ in _RUNS if name == row.name)
  plan = study.plan(row.run, 'paper')
  bounds = {name: plan.epsilon(accountant=name) for name in privacy.ACCOUNTANTS}
  rest = dataclasses.asdict(plan)
  del rest['noise_multiplier'], rest['simulation_divisor']
  sigmas = {
    name: privacy.calibrate(epsilon=target, **rest | {'accountant': name}).noise_multiplier
    for name in privacy.ACCOUNTANTS
  }
  return unmeasured(row) | {
    'value': bounds['pld'],
    'epsilon': plan.epsilon(),
    'noise_multiplier': plan.noise_multiplier,
    'epsilon_rdp': bounds['rdp'],
    'epsilon_pld': bounds['pld'],
    'target': target,
    'sigma_rdp': sigmas['rdp'],
    'sigma_pld': sigmas['pld'],
  }


def _findings(rows):
  tighter = [row for row in rows if row['epsilon_pld'] < row['epsilon_rdp']]
  main = rows[0]
  return [
    Finding(
      'the PLD accountant is tighter than RDP for every run',
      len(tighter) == len(rows),
      f'{len(tighter)} of {len(rows)} runs; of the main run {main["epsilon_pld"]:.2f} against'
      f' {main["epsilon_rdp"]:.2f}',
    ),
    Finding(
      'at epsilon 8 the main run needs less noise than the paper used',
      main['sigma_pld'] < main['noise_multiplier'],
      f'sigma {main["sigma_pld"]:.4f} instead of {main["noise_multiplier"]:g}',
    ),
  ]


TABLE = Table('What the runs guarantee', _rows, _findings, _measure, number='.3f')
