"""The privacy parameters of a run, checked to belong together."""

import dataclasses
import math

import dp_accounting

from dpcap.privacy import accounting, attacks, calibration, clipping, mechanisms, sampling


def _poisson_gaussian(plan: 'PrivacyPlan') -> dp_accounting.DpEvent:
  noise = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
  return dp_accounting.PoissonSampledDpEvent(plan.sampling_probability, noise)


def _truncated_poisson_gaussian(plan: 'PrivacyPlan') -> dp_accounting.DpEvent:
  return dp_accounting.TruncatedSubsampledGaussianDpEvent(
    plan.dataset_size,
    plan.sampling_probability,
    plan.truncated_batch_size,
    plan.noise_multiplier,
  )


def _no_guarantee(plan: 'PrivacyPlan') -> dp_accounting.DpEvent:
  del plan
  return dp_accounting.NonPrivateDpEvent()


# What one step is to an accountant. A pair that is not here does not belong together and
# is refused.
_EVENTS = {
  ('poisson', 'gaussian'): _poisson_gaussian,
  ('truncated_poisson', 'gaussian'): _truncated_poisson_gaussian,
  ('poisson', 'none'): _no_guarantee,
  ('truncated_poisson', 'none'): _no_guarantee,
  ('shuffle', 'none'): _no_guarantee,
}


# Less noise is no privacy, and accountants overflow.
_SMALLEST_NOISE_MULTIPLIER = 1e-3

# Where a draw is truncated unless said otherwise, in standard deviations of its size above
# the mean: it costs no epsilon, and hardly ever happens.
_TRUNCATED_DEVIATIONS = 8


@dataclasses.dataclass(frozen=True)
class PrivacyPlan:
  """Everything that the guarantee of a run depends on, and its accounting.

  Attributes:
    dataset_size: N, fixed and public.
    expected_batch_size: q N, the denominator of every mean.
    steps: logical batches in the whole run.
    delta: of (epsilon, delta).
    clip_norm: C; infinity only with the mechanism 'none'.
    noise_multiplier: sigma, in units of C; 0 with the mechanism 'none'.
    mechanism: a key of MECHANISMS.
    sampler: a key of SAMPLERS.
    accountant: a key of ACCOUNTANTS, the one that epsilon is read by ('pld': or by RDP, where
      that is tighter, as it is at a delta that rounding blurs).
    truncated_batch_size: the most that a draw of the sampler 'truncated_poisson' holds, by
      default eight standard deviations above the mean; None with the others.
    simulation_divisor: None for a run; k for a simulation of one whose batch and noise multiplier
      are k times these (see `simulation`). It has no guarantee.

  Raises:
    ValueError: naming the field, its value and what is allowed.
  """

  dataset_size: int
  expected_batch_size: int
  steps: int
  delta: float
  clip_norm: float
  noise_multiplier: float
  mechanism: str = 'gaussian'
  sampler: str = 'poisson'
  accountant: str = 'pld'
  truncated_batch_size: int | None = None
  simulation_divisor: int | None = None

  def __post_init__(self):
    _check_sizes(self.dataset_size, self.expected_batch_size, self.steps, self.delta)
    _check_pair(self.sampler, self.mechanism)
    self._settle_truncation()
    if self.accountant not in accounting.ACCOUNTANTS:
      raise ValueError(
        f'accountant is {self.accountant!r}; allowed: {", ".join(accounting.ACCOUNTANTS)}'
      )
    if self.simulation_divisor is not None:
      self._check_simulation()
    if self.noisy:
      run = self.simulated or self  # what can't run can't be simulated
      for name, least in (
        ('noise_multiplier', _SMALLEST_NOISE_MULTIPLIER),
        ('clip_norm', clipping.SMALLEST_CLIP_NORM),
      ):
        if not least <= getattr(run, name) < math.inf:
          value = getattr(run, name)
          raise ValueError(f'{name} is {value}; it must be finite and at least {least}')
    elif self.noise_multiplier != 0:
      raise ValueError(
        f"noise_multiplier is {self.noise_multiplier}; with mechanism 'none' it must be 0"
      )
    if not accounting.covers(self.event(self.steps), self.accountant):
      raise ValueError(
        f'accountant is {self.accountant!r}, which does not cover sampler {self.sampler!r}'
        f' with mechanism {self.mechanism!r}'
      )

  def _check_simulation(self):
    k = self.simulation_divisor
    if type(k) is not int or k < 1:
      raise ValueError(f'simulation_divisor is {k}; it must be a whole number, 1 or more')
    if not self.noisy:
      raise ValueError(
        f"simulation_divisor is {k}; with mechanism 'none' there is no noise to divide"
      )

  def _settle_truncation(self):
    value = self.truncated_batch_size
    if self.sampler != 'truncated_poisson':
      if value is not None:
        raise ValueError(
          f"truncated_batch_size is {value}; it goes with sampler 'truncated_poisson' only"
        )
      return
    if value is None:
      mean, q = self.expected_batch_size, self.sampling_probability
      value = math.ceil(mean + _TRUNCATED_DEVIATIONS * math.sqrt(mean * (1 - q)))
      object.__setattr__(self, 'truncated_batch_size', min(value, self.dataset_size))
    elif not self.expected_batch_size <= value <= self.dataset_size:
      raise ValueError(
        f'truncated_batch_size is {value}; it must be from expected_batch_size,'
        f" {self.expected_batch_size}, to the data set's size, {self.dataset_size}"
      )

  @property
  def noisy(self) -> bool:
    """Whether gradients are clipped and noise is added."""
    return self.mechanism != 'none'

  @property
  def private(self) -> bool:
    """Whether the run has a guarantee at all: a simulation is noisy and has none."""
    return self.noisy and self.simulation_divisor is None

  def simulation(self, divisor: int) -> 'PrivacyPlan':
    """The same run at a `divisor`-th of its batch and noise, without a guarantee.

    Gradients have as much noise for their signal as those of this run, at the same steps and
    learning rate, and cost a `divisor`-th (Sander et al. 2023, arXiv 2210.03403, section 4).

    Raises:
      ValueError: if expected_batch_size is no multiple of the divisor, the mechanism is 'none', or
        draws are truncated elsewhere than by default.
    """
    if type(divisor) is not int or divisor < 1 or self.expected_batch_size % divisor:
      raise ValueError(
        f'simulation_divisor is {divisor}; it must be a whole number, 1 or more, that divides'
        f' expected_batch_size, {self.expected_batch_size}'
      )
    if dataclasses.replace(self, truncated_batch_size=None) != self:
      raise ValueError(
        f'truncated_batch_size is {self.truncated_batch_size}; with simulation_divisor it must be'
        ' None, which truncates both draws 8 deviations above the mean'
      )
    return dataclasses.replace(
      self,
      expected_batch_size=self.expected_batch_size // divisor,
      noise_multiplier=self.noise_multiplier / divisor,
      truncated_batch_size=None,
      simulation_divisor=divisor,
    )

  @property
  def simulated(self) -> 'PrivacyPlan | None':
    """The run that this simulates, with its guarantee; None if it simulates none."""
    k = self.simulation_divisor
    if k is None:
      return None
    return dataclasses.replace(
      self,
      expected_batch_size=self.expected_batch_size * k,
      noise_multiplier=self.noise_multiplier * k,
      truncated_batch_size=None,
      simulation_divisor=None,
    )

  @property
  def sampling_probability(self) -> float:
    """q."""
    return self.expected_batch_size / self.dataset_size

  def event(self, releases: int) -> dp_accounting.DpEvent:
    """What `releases` distinct noisy gradients are to an accountant: a simulation's are bare."""
    simulates = self.simulation_divisor is not None
    event = (_no_guarantee if simulates else _EVENTS[self.sampler, self.mechanism])(self)
    return dp_accounting.SelfComposedDpEvent(event, releases)

  def epsilon(self, releases: int | None = None, accountant: str | None = None) -> float | None:
    """Epsilon after `releases` (default: all steps).

    By `accountant` alone, None if it does not cover the event; by default by the plan's, or
    by RDP where that is tighter than the PLD (see `accounting.tightest_epsilon`).
    """
    releases = self.steps if releases is None else releases
    if releases == 0:
      return 0.0
    event = self.event(releases)
    if accountant is None:
      return accounting.tightest_epsilon(event, self.delta, self.accountant)
    return accounting.epsilon(event, self.delta, accountant)

  def is_within(self, epsilon: float) -> bool:
    """Whether all steps are known to spend at most `epsilon`: see `accounting.is_within`."""
    return accounting.is_within(self.event(self.steps), epsilon, self.delta, self.accountant)

  def gaussian_mu(self, releases: int) -> float | None:
    """The mu of Gaussian differential privacy after `releases`: see `attacks.gaussian_mu`."""
    return attacks.gaussian_mu(self.event(releases)) if releases else 0.0

  def attack_tpr(self, false_positive_rate: float, releases: int) -> float | None:
    """What an attack finds at most after `releases`: see `attacks.true_positive_rate`."""
    if releases == 0:
      return false_positive_rate
    return attacks.true_positive_rate(self.event(releases), false_positive_rate)

  def make_sampler(self, key: tuple[int, int]):
    """The sampler of this plan under a secret sampling key."""
    settings = {}
    if self.truncated_batch_size is not None:
      settings['truncated_batch_size'] = self.truncated_batch_size
    make = sampling.SAMPLERS[self.sampler]
    return make(self.dataset_size, self.expected_batch_size, key, **settings)

  def make_mechanism(self) -> mechanisms.Mechanism:
    """The noise mechanism of this plan."""
    return mechanisms.MECHANISMS[self.mechanism](self.noise_multiplier, self.clip_norm)


def calibrate(
  *,
  epsilon: float,
  dataset_size: int,
  expected_batch_size: int,
  steps: int,
  delta: float,
  clip_norm: float,
  mechanism: str = 'gaussian',
  sampler: str = 'poisson',
  accountant: str = 'pld',
  truncated_batch_size: int | None = None,
) -> PrivacyPlan:
  """A plan with the least noise that keeps the whole run within `epsilon`.

  Arguments are PrivacyPlan's. epsilon = infinity is the run without privacy: its mechanism
  is 'none', whatever is given.

  Raises:
    ValueError: as PrivacyPlan does, or if no noise multiplier meets epsilon.
  """
  _check_sizes(dataset_size, expected_batch_size, steps, delta)
  if not epsilon > 0:
    raise ValueError(f'epsilon is {epsilon}; it must be positive, no noise_multiplier meets it')
  if epsilon == math.inf:
    mechanism = 'none'
  elif mechanism == 'none':
    raise ValueError(f"mechanism is 'none' and epsilon is {epsilon}; it goes with epsilon = inf")
  rest = dict(
    dataset_size=dataset_size,
    expected_batch_size=expected_batch_size,
    steps=steps,
    delta=delta,
    clip_norm=clip_norm,
    mechanism=mechanism,
    sampler=sampler,
    accountant=accountant,
    truncated_batch_size=truncated_batch_size,
  )
  _check_pair(sampler, mechanism)
  if mechanism == 'none':
    return PrivacyPlan(noise_multiplier=0.0, **rest)
  trial = PrivacyPlan(noise_multiplier=1.0, **rest)
  noise_multiplier = calibration.calibrate_noise_multiplier(
    lambda sigma: dataclasses.replace(trial, noise_multiplier=sigma).event(steps),
    epsilon,
    delta,
    accountant,
  )
  return dataclasses.replace(trial, noise_multiplier=noise_multiplier)


def _check_sizes(dataset_size, expected_batch_size, steps, delta):
  if not dataset_size >= 1:
    raise ValueError(f'dataset_size is {dataset_size}; it must be at least 1')
  if not 1 <= expected_batch_size <= dataset_size:
    raise ValueError(
      f'expected_batch_size is {expected_batch_size}; it must be from 1 to the'
      f" data set's size, {dataset_size}"
    )
  if not steps >= 1:
    raise ValueError(f'steps is {steps}; it must be at least 1')
  if not 0 < delta < 1:
    raise ValueError(f'delta is {delta}; it must be above 0 and below 1')


def _check_pair(sampler, mechanism):
  for name, value, allowed in (
    ('sampler', sampler, sampling.SAMPLERS),
    ('mechanism', mechanism, mechanisms.MECHANISMS),
  ):
    if value not in allowed:
      raise ValueError(f'{name} is {value!r}; allowed: {", ".join(allowed)}')
  if (sampler, mechanism) not in _EVENTS:
    pairs = ', '.join(f'{s} with {m}' for s, m in _EVENTS)
    raise ValueError(
      f'sampler is {sampler!r} and mechanism is {mechanism!r}, which no accountant covers;'
      f' allowed: {pairs}'
    )
