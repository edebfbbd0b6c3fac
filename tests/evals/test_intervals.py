"""Intervals agree with the definition."""

import numpy as np
import pytest

from dpcap.evals.intervals import wilson_interval


@pytest.mark.parametrize(
  'share,n,low,high',
  [
    (0.5, 100, 0.4038, 0.5962),
    (0.0, 10, 0.0, 0.2775),
    (1.0, 10, 0.7225, 1.0),
    (0.954, 5000, 0.9478, 0.9595),
  ],
)
def test_wilson_interval(share, n, low, high):
  """Against published values and the quadratic that defines the interval."""
  found = wilson_interval(share, n)
  np.testing.assert_allclose(found, (low, high), atol=2e-4)
  for p in found:
    if 1e-9 < p < 1 - 1e-9:
      assert abs(abs(share - p) - 1.959964 * np.sqrt(p * (1 - p) / n)) < 1e-9


def test_a_share_is_inside_its_interval():
  for n in range(1, 200):
    for right in {0, 1, n // 2, n}:
      low, high = wilson_interval(right / n, n)
      assert 0 <= low <= right / n <= high <= 1
