"""What the best attack can tell: whether one example was among those trained on.

An attack sees everything that a run released, knows all other examples, and decides whether the
one was there. Its false-positive rate is how often it says so of one that was not, its
true-positive rate how often it says so of one that was.
"""

import math

import dp_accounting
from scipy import optimize

from dpcap.privacy import accounting

# Up to where a minimum over epsilon is looked for; any point gives a bound.
_LARGEST_EPSILON = 30.0

# On sums in 64 bits of as many terms as a PLD has losses.
_MARGIN = 1e-9


def gaussian_mu(event: dp_accounting.DpEvent) -> float | None:
  """The mu of mu-Gaussian differential privacy (Dong et al. 2022, arXiv 1905.02383).

  Formal guarantee: to tell a run from one with an example replaced by nothing is at least as hard
  as to tell N(0, 1) from N(mu, 1), at every false-positive rate. It is sqrt(releases) / sigma, and
  exact, where every step takes all of the data.

  Args:
    event: what was released in all.

  Returns:
    mu; None if batches are drawn at random. Then the central limit theorem gives an
    approximation and no bound, and the PLD knows nothing of deltas below 1e-15, where a curve of
    mu-GDP would have to lie above it as well.
  """
  step = event.event
  if not isinstance(step, dp_accounting.PoissonSampledDpEvent) or step.sampling_probability < 1:
    return None
  return math.nextafter(math.sqrt(event.count) / step.event.noise_multiplier, math.inf)


def true_positive_rate(event: dp_accounting.DpEvent, false_positive_rate: float) -> float | None:
  """A bound on the true-positive rate of any attack on what was released.

  Formal guarantee: no attack whose false-positive rate is at most that has a higher true-positive
  rate. For every (epsilon, delta) of the mechanism, in both directions of the adjacency,
  TPR <= exp(epsilon) FPR + delta and 1 - FPR <= exp(epsilon) (1 - TPR) + delta (Kairouz et al.
  2015, arXiv 1311.0776); the least of these is taken, with the deltas of the PLD.

  Args:
    event: what was released in all.
    false_positive_rate: in (0, 1).

  Returns:
    In (0, 1]; None if the PLD has no guarantee at all.
  """
  losses = accounting.privacy_losses(event)
  if losses is None:
    return None

  def delta(epsilon):
    return losses.get_delta_for_epsilon(epsilon) + accounting.smallest_delta(event.count)

  def by_false_positives(epsilon):
    return math.exp(epsilon) * false_positive_rate + delta(epsilon)

  def by_false_negatives(epsilon):
    return 1 - math.exp(-epsilon) * (1 - false_positive_rate - delta(epsilon))

  largest = min(_LARGEST_EPSILON, -math.log(false_positive_rate))
  least = min(
    _minimum(by_false_positives, largest), _minimum(by_false_negatives, _LARGEST_EPSILON)
  )
  return min(1.0, least * (1 + _MARGIN))


def _minimum(bound, largest):
  found = optimize.minimize_scalar(
    bound, bounds=(0, largest), method='bounded', options={'xatol': 1e-4}
  )
  return min(bound(0.0), float(found.fun))
