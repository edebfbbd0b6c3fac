"""DP-Cap's study (Sander et al. 2024): 233M image-text pairs, the main run at epsilon 8.

    --config=configs/dpcap.py                          the paper's main run
    --config=configs/dpcap.py:large,epsilon2           a word of each family, in any order

Sigma is the paper's where it has the run, and calibrated by PLD where not, or by the word
`calibrated`: at equal epsilon that takes less noise. configs/README.md lists the words.
"""

import math

from dpcap import config as config_lib

# Pairs in the paper's deduplicated and blurred subset of LAION-2B.
LAION_233M = 233_804_767

SIZES = {'base': 'base', 'nano': 'nano', 'tiny': 'tiny', 'small': 'small', 'large': 'large'}
EPSILONS = {
  # word: (epsilon, steps); those of 1 and of the run without privacy are not the paper's
  'epsilon8': (8.0, 5_708),
  'epsilon2': (2.0, 2_854),
  'epsilon1': (1.0, 2_854),
  'nonprivate': (math.inf, 5_708),
}
BATCHES = {
  # word: (expected batch size, learning rate); all but the first two are a sweep of ours
  'batch1m': (1_310_720, 5.12e-4),  # 1e-7 x batch / 256
  'batch200k': (200_000, 5.11e-4),  # 6.54e-7 x batch / 256
  'batch655k': (655_360, 5.12e-4),
  'batch328k': (327_680, 5.12e-4),
  'batch82k': (81_920, 5.12e-4),
  'batch20k': (20_480, 5.12e-4),
}
SHARES = {'100percent': 1.0, '10percent': 0.1, '1percent': 0.01}  # the batch in proportion
NOISE = {'paper': False, 'calibrated': True}
SIMULATION = {'real': None, 'simulated': 64}  # see privacy.simulation_divisor
STAGES = {'scratch': None, 'synthetic': 'runs/textures'}  # the paper's; see textures.py

# (epsilon, batch) -> (sigma, steps)
_PAPER = {
  ('epsilon8', 'batch1m'): (0.728, 5_708),
  ('epsilon2', 'batch1m'): (1.18, 2_854),
  ('epsilon8', 'batch200k'): (0.513, 5_700),
}


def get_config(argument=''):
  """Words of SIZES, EPSILONS, BATCHES, SHARES, NOISE, SIMULATION and STAGES, parted by commas."""
  families = SIZES, EPSILONS, BATCHES, SHARES, NOISE, SIMULATION, STAGES
  words = config_lib.read_words(argument, *families)
  size, epsilon, batch, share, noise, simulation, stage = words
  config = config_lib.base_config()

  config.model.size = SIZES[size]

  config.data.source = config_lib.source_config('tar_shards', path='laion233m', caption_key='txt')
  config.data.dataset_size = int(SHARES[share] * LAION_233M)
  if share != '100percent':
    config.data.source.path += f'-{share}'
  config.data.image_size = 224
  config.data.text_length = 40
  config.data.tokenizer = 'wordpiece'
  config.data.vocabulary = 'bert-base-uncased-vocab.txt'
  config.data.crop_scale = (0.2, 1.0)
  config.data.flip = True
  config.data.workers = 16

  full_batch, config.optimizer.learning_rate = BATCHES[batch]
  config.privacy.clip_norm = 1.0
  config.privacy.expected_batch_size = int(SHARES[share] * full_batch)
  config.privacy.epsilon, config.train.steps = EPSILONS[epsilon]
  if (epsilon, batch) in _PAPER:
    sigma, config.train.steps = _PAPER[epsilon, batch]
    if not NOISE[noise]:
      config.privacy.epsilon, config.privacy.noise_multiplier = None, sigma
  config.privacy.simulation_divisor = SIMULATION[simulation]

  config.optimizer.warmup_steps = 2_000
  config.optimizer.decay_steps = 10_000  # the run is cut off at 5,708 of them
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.005
  if STAGES[stage]:
    config.train.init = STAGES[stage]
    config.train.init_parts = ('encoder',)
  return config
