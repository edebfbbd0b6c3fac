"""DP-Cap with a batch of 200,000 at epsilon 8 (Sander et al. 2024)."""

from configs import dpcap


def get_config(size='base'):
  """As dpcap.py, but for batch, noise, steps and learning rate."""
  config = dpcap.get_config(size)
  config.privacy.expected_batch_size = 200_000
  config.privacy.noise_multiplier = 0.513
  config.optimizer.learning_rate = 5.11e-4  # 6.54e-7 x batch / 256
  config.train.steps = 5_700
  return config
