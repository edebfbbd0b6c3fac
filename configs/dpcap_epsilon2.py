"""DP-Cap at epsilon 2: more noise, half the steps (Sander et al. 2024)."""

from configs import dpcap


def get_config(size='base'):
  """As dpcap.py, but for the noise and the number of steps."""
  config = dpcap.get_config(size)
  config.privacy.noise_multiplier = 1.18
  config.train.steps = 2_854
  return config
