"""Epsilon along a run, worked out while the run goes on."""

from concurrent import futures

from dpcap import privacy


class EpsilonCurve:
  """A plan's epsilon after any number of releases; what is expected is computed in a thread."""

  def __init__(self, plan: privacy.PrivacyPlan):
    self._plan = plan
    self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix='epsilon')

  def expect(self, releases: int) -> None:
    """Begins to compute what `at` may be asked next."""
    self._pool.submit(self._plan.epsilon, releases)

  def at(self, releases: int) -> float:
    """`plan.epsilon(releases)`: at once if it was expected, else it takes its time."""
    return self._plan.epsilon(releases)

  def close(self) -> None:
    """Gives up what is not begun."""
    self._pool.shutdown(wait=False, cancel_futures=True)
