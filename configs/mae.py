"""A masked autoencoder without privacy (He et al. 2022), on the pairs that DP-Cap and ViP train on.

    --config=configs/mae.py:small

The paper has this baseline; its recipe there is not known. Here it is MAE's own.
"""

import math

from configs import vip
from configs.dpcap import SIZES
from dpcap import config as config_lib


def get_config(argument=''):
  """A word of SIZES."""
  (size,) = config_lib.read_words(argument, SIZES)
  config = vip.get_config(size)
  config.privacy.epsilon, config.privacy.noise_multiplier = math.inf, None
  config.privacy.delta = None
  config.privacy.expected_batch_size = 4_096
  config.optimizer.learning_rate = 1.5e-4 * 4_096 / 256
  config.optimizer.warmup_steps = 5_000
  config.optimizer.weight_decay = 0.05
  config.train.steps = 100_000  # 1.75 times through the pairs
  return config
