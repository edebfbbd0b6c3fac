"""The privacy statement that goes with every checkpoint, for people and for programs."""

from collections.abc import Sequence

from dpcap.privacy import accounting, clipping
from dpcap.privacy.plan import PrivacyPlan

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

  Returns:
    A dict whose 'epsilon' maps each accountant to its bound (None: no finite bound, or
    the event is not covered), and whose 'text' says the same for people.
  """
  if releases < steps:
    raise ValueError(f'releases is {releases}; it must be at least the steps, {steps}')
  bounds = {
    name: accounting.finite_or_none(plan.epsilon(releases, name)) for name in accounting.ACCOUNTANTS
  }
  statement = {
    'private': plan.private and not fixed_seed and bounds[plan.accountant] is not None,
    'unit': f'one {unit}',
    'adjacency': _ADJACENCY.format(unit),
    'mechanism': _MECHANISMS[plan.mechanism],
    'sampler': _SAMPLERS[plan.sampler],
    'dataset_size': plan.dataset_size,
    'expected_batch_size': plan.expected_batch_size,
    'sampling_probability': plan.sampling_probability,
    'truncated_batch_size': plan.truncated_batch_size,
    'noise_multiplier': plan.noise_multiplier,
    'clip_norm': plan.clip_norm if plan.private else None,
    'clipping': clipping_strategy,
    'clip_function': clip_function if plan.private else None,
    'sensitivity_rounding_margin': clipping.ROUNDING_MARGIN,
    'steps': steps,
    'releases': releases,
    'delta': plan.delta,
    'accountant': plan.accountant,
    'epsilon': bounds,
    'key_policy': _SEED if fixed_seed else _ENTROPY if keys_are_stored else _FORGOTTEN,
    'not_covered': [
      *not_covered,
      'hyper-parameters, if they were tuned on the private data',
      'the float32 resolution of sums and noise: rounding, and no noise past 5.4 deviations',
      'other runs on the same data: guarantees of several runs add up',
    ],
  }
  statement['text'] = statement_text(statement)
  return statement


def statement_text(statement: dict) -> str:
  """The statement in sentences."""
  s = statement
  if not s['private']:
    if not s['noise_multiplier']:
      reason = 'no noise was added'
    elif s['key_policy'] == _SEED:
      reason = _SEED
    else:
      reason = f'noise multiplier {s["noise_multiplier"]:g} has no finite bound worth the name'
    return f'This model has NO privacy guarantee: {reason}.'
  bounds = ', '.join(
    f'{value:.3f} by {name.upper()}' for name, value in s['epsilon'].items() if value is not None
  )
  at_most = s['truncated_batch_size']
  return (
    f'This model is (epsilon, delta)-differentially private with epsilon = {bounds},'
    f' delta = {s["delta"]:.3g}. Unit: {s["unit"]}; adjacency: {s["adjacency"]}.'
    f' Mechanism: {s["mechanism"]}, of standard deviation {s["noise_multiplier"]:.4f} x C,'
    f' C = {s["clip_norm"]:g}. Sampler: {s["sampler"]}, q = {s["expected_batch_size"]:,} /'
    f' {s["dataset_size"]:,} = {s["sampling_probability"]:.3g}'
    f'{f", at most {at_most:,}" if at_most else ""}. {s["releases"]:,} noisy gradients were'
    f' released ({s["steps"]:,} steps). Keys: {s["key_policy"]}.'
    f' Not covered: {"; ".join(s["not_covered"])}.'
  )
