"""How far a measured share can be trusted."""

import math


def wilson_interval(share: float, n: int) -> tuple[float, float]:
  """95% interval of a share of n independent trials (Wilson 1927)."""
  z = 1.959964
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  # Rounding may leave a share of 0 or 1 outside.
  return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
