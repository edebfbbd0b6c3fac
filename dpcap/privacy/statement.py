"""The privacy statement that goes with every checkpoint, for people and for programs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpcap.privacy import accounting, clipping
from dpcap.privacy.plan import PrivacyPlan
from dpcap.privacy.provenance import describe_start, is_generated

_ADJACENCY = 'zero-out: one {} replaced by nothing, N and q fixed and public'

_MECHANISMS = {
  'gaussian': 'independent Gaussian noise on the sum of clipped gradients, once per step',
  'none': 'none: gradients are released as they are',
}
_SAMPLERS = {
  'poisson': 'Poisson: every example in every step independently with probability q',
  'truncated_poisson': (
    'truncated Poisson: every example in every step independently with probability q, the'
    ' surplus over a maximum dropped uniformly at random'
  ),
  'shuffle': 'shuffled epochs, batches of fixed size',
}
_ENTROPY = (
  'noise key (64 bits, threefry) and sampling key (128 bits, Philox) drawn from the operating'
  " system's entropy, kept secret beside the run, in no checkpoint, log or config"
)
_FORGOTTEN = (
  "noise key (64 bits, threefry) and sampling key (128 bits, Philox) drawn from the operating system's"
  ' entropy, forgotten with the process, on no disk'
)
_SEED = 'keys derived from a fixed seed in the config: anybody can compute the noise'

# At which the true-positive rate of the best attack is said.
_FALSE_POSITIVE_RATES = (0.01, 0.001)

# A delta above it, or above 1/N, is spelled out.
_LARGE_DELTA = 1e-3


def make_statement(
  plan: PrivacyPlan,
  *,
  steps: int,
  releases: int,
  clipping_strategy: str,
  clip_function: str,
  not_covered: Sequence[str],
  unit: str = 'image-text pair',
  fixed_seed: bool = False,
  keys_are_stored: bool = True,
  data: Mapping[str, Any] | None = None,
  start: Mapping[str, Any] | None = None,
) -> dict:
  """What is revealed by parameters that `releases` noisy gradients led to, as a JSON-ready dict.

  Args:
    plan: the run's privacy parameters.
    steps: in the model's history.
    releases: distinct noisy gradients computed, at least `steps` (see KeyStore).
    clipping_strategy: how per-example clipping was computed.
    clip_function: what scaled an example's gradient.
    not_covered: what the guarantee leaves out beside what it always does.
    unit: what one example is.
    fixed_seed: whether the keys came from a seed, which voids the guarantee.
    keys_are_stored: whether the keys are in a KeyStore; False: nowhere.
    data: what was trained on: 'source', its kind, and 'generated', whether its records are drawn
      from no data, so that nothing in them is private; None: not said.
    start: the weights that the run started from (`provenance.make_start`); None: none.

  Returns:
    A dict whose 'private' says whether the model has a guarantee: one of its run, given what that
    started from ('private_given_init'), and one of all that stands behind the start. Its 'epsilon'
    maps each accountant to the run's bound (None: no finite bound, or the event is not covered;
    'init' has the sum with the start's), its 'attack_tpr' maps false-positive rates to the most
    that the true-positive rate of an attack on the run can be, its 'gdp_mu' is the run's mu of
    Gaussian differential privacy (None for either: none is known), its 'simulates' holds the
    figures of the run that this is a simulation of (None: of none), and its 'text' says the same
    for people.
  """
  if releases < steps:
    raise ValueError(f'releases is {releases}; it must be at least the steps, {steps}')
  own = {
    'private_given_init': (
      plan.private and not fixed_seed and math.isfinite(plan.epsilon(releases))
    ),
    'data': None if data is None else dict(data),
    'epsilon': _bounds(plan, releases),
    'delta': plan.delta,
  }
  init = None if start is None else describe_start(start, own | {'unit': f'one {unit}'})
  private = own['private_given_init'] and (init is None or init['composed'] is not None)
  statement = {
    'private': private,
    'simulates': _simulated_figures(plan, releases),
    'unit': f'one {unit}',
    'adjacency': _ADJACENCY.format(unit),
    'mechanism': _MECHANISMS[plan.mechanism],
    'sampler': _SAMPLERS[plan.sampler],
    'dataset_size': plan.dataset_size,
    'expected_batch_size': plan.expected_batch_size,
    'sampling_probability': plan.sampling_probability,
    'truncated_batch_size': plan.truncated_batch_size,
    'noise_multiplier': plan.noise_multiplier,
    'clip_norm': plan.clip_norm if plan.noisy else None,
    'clipping': clipping_strategy,
    'clip_function': clip_function if plan.noisy else None,
    'sensitivity_rounding_margin': clipping.ROUNDING_MARGIN,
    'init': init,
    'steps': steps,
    'releases': releases,
    **own,
    'delta_allows': delta_allows(plan.delta, plan.dataset_size),
    'accountant': plan.accountant,
    **attack_figures(plan, releases if private else None),
    'key_policy': _SEED if fixed_seed else _ENTROPY if keys_are_stored else _FORGOTTEN,
    'not_covered': [
      *not_covered,
      'hyper-parameters, if they were tuned on the private data',
      'the float32 resolution of sums and noise: rounding, and no noise past 5.4 deviations',
      'other runs on the same data: guarantees of several runs add up',
      *([] if init is None or init['covered'] else ['what the start was trained on']),
    ],
  }
  statement['text'] = statement_text(statement)
  return statement


def _bounds(plan: PrivacyPlan, releases: int) -> dict[str, float | None]:
  return {
    name: accounting.finite_or_none(plan.epsilon(releases, name)) for name in accounting.ACCOUNTANTS
  }


def _simulated_figures(plan: PrivacyPlan, releases: int) -> dict | None:
  """What the simulated run would be after as many releases; None for a run of its own."""
  run = plan.simulated
  return run and {
    'divisor': plan.simulation_divisor,
    'expected_batch_size': run.expected_batch_size,
    'noise_multiplier': run.noise_multiplier,
    'sampling_probability': run.sampling_probability,
    'epsilon': _bounds(run, releases),
  }


def attack_figures(plan: PrivacyPlan, releases: int | None) -> dict:
  """What is said beside epsilon, JSON-ready: 'gdp_mu' and 'attack_tpr' after `releases`.

  releases = None is a run without a guarantee: nothing is known.
  """
  known = releases is not None
  return {
    'gdp_mu': plan.gaussian_mu(releases) if known else None,
    'attack_tpr': {
      f'{rate:g}': plan.attack_tpr(rate, releases) if known else None
      for rate in _FALSE_POSITIVE_RATES
    },
  }


def delta_allows(delta: float, dataset_size: int) -> str | None:
  """In words what a large delta permits; None for one up to 1e-3 and 1/N."""
  limits = [f'1/N = {1 / dataset_size:.3g}'] if delta > 1 / dataset_size else []
  limits += [f'{_LARGE_DELTA:g}'] if delta > _LARGE_DELTA else []
  if not limits:
    return None
  return (
    f'delta = {delta:.3g} is above {" and ".join(limits)}: a mechanism that publishes every record'
    f' with probability {delta:.3g}, {delta * dataset_size:,.3g} of {dataset_size:,} on average,'
    ' satisfies it as well'
  )


def statement_text(statement: dict) -> str:
  """The statement in sentences."""
  s = statement
  start = f' {s["init"]["text"]}' if s['init'] else ''
  if not s['private_given_init']:
    if not s['noise_multiplier']:
      reason = 'no noise was added'
    elif s['simulates']:
      reason = _simulation_text(s)
    elif s['key_policy'] == _SEED:
      reason = _SEED
    else:
      reason = f'noise multiplier {s["noise_multiplier"]:g} has no finite bound worth the name'
    of_nobody = ''
    if s['data'] and s['data']['generated']:
      of_nobody = f" Its data are generated ({s['data']['source']}): nothing in them is private."
    return f'This model has NO privacy guarantee: {reason}.{of_nobody}{start}'
  model, it, on = 'This model', 'It', ''
  if s['init'] and not is_generated(s['init']['statement']):
    model = 'Given the weights that it started from, this model'
    it, on = 'Given them, it', ' on its run alone'
  if not s['private']:
    model = f'This model has NO privacy guarantee: {_start_text(s["init"])}. {model}'
  bounds = _bounds_text(s['epsilon'])
  at_most, mu = s['truncated_batch_size'], s['gdp_mu']
  found = ', '.join(
    f'{_percent_up(tpr)} at a false-positive rate of {float(rate):.1%}'
    for rate, tpr in s['attack_tpr'].items()
    if tpr is not None
  )
  attacks = f' No attack{on} tells that an example was there with a probability above {found}.'
  return (
    f'{model} is (epsilon, delta)-differentially private with epsilon = {bounds},'
    f' delta = {s["delta"]:.3g}.'
    f'{" Caution: " + s["delta_allows"] + "." if s["delta_allows"] else ""}'
    f'{"" if mu is None else f" {it} is {_four_digits_up(mu)}-Gaussian differentially private."}'
    f'{attacks if found else ""}'
    f' Unit: {s["unit"]}; adjacency: {s["adjacency"]}.'
    f' Mechanism: {s["mechanism"]}, of standard deviation {s["noise_multiplier"]:.4f} x C,'
    f' C = {s["clip_norm"]:g}. Sampler: {s["sampler"]}, q = {s["expected_batch_size"]:,} /'
    f' {s["dataset_size"]:,} = {s["sampling_probability"]:.3g}'
    f'{f", at most {at_most:,}" if at_most else ""}. {s["releases"]:,} noisy gradients were'
    f' released ({s["steps"]:,} steps). Keys: {s["key_policy"]}.'
    f' Not covered: {"; ".join(s["not_covered"])}.{start}'
  )


def _start_text(init: Mapping[str, Any]) -> str:
  if init['covered']:
    return 'no bound is known of its run together with what it started from'
  return 'what it started from has none that is known'


def _bounds_text(bounds: dict[str, float | None]) -> str:
  return ', '.join(
    f'{value:.3f} by {name.upper()}' for name, value in bounds.items() if value is not None
  )


def _simulation_text(s: dict) -> str:
  run = s['simulates']
  return (
    f'it is a simulation, at batch {s["expected_batch_size"]:,} and noise multiplier'
    f' {s["noise_multiplier"]:.4g}, of a run at batch {run["expected_batch_size"]:,} and noise'
    f' multiplier {run["noise_multiplier"]:.4g}, of epsilon'
    f' {_bounds_text(run["epsilon"]) or "infinity"}, delta = {s["delta"]:.3g}; that is the'
    " other run's, and not this model's"
  )


def _percent_up(share: float) -> str:
  return f'{math.ceil(min(share, 1.0) * 1e4) / 100:.2f}%'


def _four_digits_up(value: float) -> str:
  return f'{math.ceil(value * 1e4) / 1e4:.4f}'
