"""Which batch, steps and size a budget of privacy and compute is best spent on."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from dpcap.errors import UserError
from dpcap.training import noise_cache
from tools.search_parts.law import Law

# A law says nothing of what is further outside of its range than this.
FURTHEST = 4.0

# Plans that are shown, and calibrated by PLD, which takes seconds each.
SHORT_LIST = 10

_SMALLEST_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Budget:
  """What there is to spend.

  Attributes:
    dataset_size: N.
    epsilon, delta: of the whole run.
    compute: floating-point operations for all gradients.
  """

  dataset_size: int
  epsilon: float
  delta: float
  compute: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """One way to spend it.

  Attributes:
    size, batch, steps: of the run.
    noise_multiplier: sigma.
    ratio: sigma / batch.
    loss: predicted.
    compute: floating-point operations.
    outside: factor by which it is outside of what was measured; 1: within.
  """

  size: str
  batch: int
  steps: int
  noise_multiplier: float
  ratio: float
  loss: float
  compute: float
  outside: float


# (batch, steps, accountant) -> sigma that meets the budget; None: none does.
Noise = Callable[[int, int, str], float | None]


def calibrated(budget: Budget) -> Noise:
  """The noise of `dpcap.privacy.calibrate` for Poisson sampling, kept in the user's cache."""

  @functools.cache
  def noise(batch, steps, accountant):
    try:
      return noise_cache.calibrate(
        epsilon=budget.epsilon,
        dataset_size=budget.dataset_size,
        expected_batch_size=batch,
        steps=steps,
        delta=budget.delta,
        clip_norm=1.0,
        accountant=accountant,
      ).noise_multiplier
    except ValueError:
      return None

  return noise


def best(law: Law, costs: Mapping[str, float], budget: Budget, noise: Noise) -> list[Plan]:
  """The best plans within the budget by predicted loss, ten or fewer, the best first.

  Batches are powers of two, steps powers of the square root of two times the fewest that were
  measured. They are ranked by the noise that RDP asks for, which is found sooner; the ten best
  get that of PLD, which is less, and are ranked anew.

  Args:
    law: of the loss.
    costs: size -> floating-point operations for the gradient of one image.
    budget: of the run.
    noise: sigma of batch, steps and accountant, as `calibrated`.

  Raises:
    UserError: if nothing within the budget is near what was measured.
  """
  found: list[Plan] = []
  for size, steps in itertools.product(costs, _step_counts(law)):
    for batch in _batches(budget, steps * costs[size]):
      if sigma := noise(batch, steps, 'rdp'):
        plan = _make_plan(law, costs, size, batch, steps, sigma)
        # A smaller batch has no lower ratio, and so no lower loss.
        if plan.ratio > FURTHEST * law.ratios[1]:
          break
        if plan.outside <= FURTHEST:
          found = sorted([*found, plan], key=_order)[:SHORT_LIST]
          if plan not in found:
            break
  if not found:
    raise UserError(
      f'within --compute={budget.compute:g} and epsilon {budget.epsilon:g} on'
      f' {budget.dataset_size:,} records no batch and steps have a noise-to-batch ratio from'
      f' {law.ratios[0] / FURTHEST:.3g} to {law.ratios[1] * FURTHEST:.3g} and'
      f' {law.steps[0]:.0f} to {law.steps[1] * FURTHEST:.0f} steps, as the law is known for;'
      ' measure other --ratios or --steps, or raise the budget'
    )
  precise = []
  for plan in found:
    sigma = noise(plan.batch, plan.steps, 'pld') or plan.noise_multiplier
    precise.append(_make_plan(law, costs, plan.size, plan.batch, plan.steps, sigma))
  return sorted(precise, key=_order)


def as_good(plans: Sequence[Plan], error: float) -> list[Plan]:
  """The plans that a law with this relative error does not tell from the best, cheapest first."""
  alike = [p for p in plans if p.loss <= plans[0].loss * (1 + error)]
  return sorted(alike, key=lambda p: p.compute)


def _order(plan):
  return plan.loss, plan.compute


def _make_plan(law, costs, size, batch, steps, sigma):
  return Plan(
    size=size,
    batch=batch,
    steps=steps,
    noise_multiplier=sigma,
    ratio=sigma / batch,
    loss=law.loss(size, steps, sigma / batch),
    compute=float(batch * steps * costs[size]),
    outside=law.outside(steps, sigma / batch),
  )


def _batches(budget, cost):
  """Powers of two that the budget allows, the largest first; `cost` is that of one image."""
  most = int(min(budget.dataset_size, budget.compute / cost))
  return [2**k for k in reversed(range(most.bit_length())) if 2**k >= _SMALLEST_BATCH]


def _step_counts(law):
  fewest, most = math.ceil(law.steps[0]), law.steps[1] * FURTHEST
  doublings = int(2 * math.log2(most / fewest))
  return sorted({round(fewest * 2 ** (k / 2)) for k in range(doublings + 1)})
