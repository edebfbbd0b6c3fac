"""ViP, the private masked autoencoder that DP-Cap is compared with (Yu et al. 2024).

    --config=configs/vip.py                         the paper's run: epsilon 8 by RDP
    --config=configs/vip.py:small,calibrated        sigma by PLD at that epsilon
    --config=configs/vip.py:script                  the recipe as it was released

Source: arXiv 2306.08842 and its code. On ImageNet-1K, as the released script has it, its noise is
no useful epsilon, 453 by PLD:

    python -m tools.privacy --config=configs/vip.py:script --config.data.dataset_size=1281167 \\
        --config.privacy.delta=3.9e-7

Here it is on the same pairs as DP-Cap, whose captions it does not read. configs/README.md lists the
words.
"""

from configs import dpcap
from configs.dpcap import LAION_233M, NOISE, SIZES
from dpcap import config as config_lib

RECIPES = {
  # word: (expected batch size, sigma, steps)
  'run': (98_304, 0.48, 6_000),
  'script': (81_920, 0.5, 10_000),
}
EPSILONS = {'epsilon8': 8.0, 'epsilon2': 2.0, 'epsilon1': 1.0}  # others than 8 are not the paper's
STAGES = {'scratch': None, 'synthetic': 'runs/textures'}


def get_config(argument=''):
  """Words of SIZES, RECIPES, EPSILONS, NOISE and STAGES, parted by commas."""
  families = SIZES, RECIPES, EPSILONS, NOISE, STAGES
  size, recipe, epsilon, noise, stage = config_lib.read_words(argument, *families)
  config = dpcap.get_config(size)  # for its data
  config.data.tokenizer, config.data.vocabulary = 'bytes', None  # no text is read

  config.model = config_lib.model_config('mae', size=size, mask_ratio=0.75)
  config.model.decoder_width = 512
  config.model.decoder_depth = 4
  config.model.decoder_heads = 16

  batch, sigma, config.train.steps = RECIPES[recipe]
  config.privacy.clip_norm = 0.1
  config.privacy.delta = 1 / (2 * LAION_233M)
  config.privacy.expected_batch_size = batch
  config.privacy.epsilon, config.privacy.noise_multiplier = EPSILONS[epsilon], None
  if epsilon == 'epsilon8' and not NOISE[noise]:
    config.privacy.epsilon, config.privacy.noise_multiplier = None, sigma

  config.optimizer.learning_rate = 1.5e-5 * batch / 256
  config.optimizer.warmup_steps = 1_000
  config.optimizer.decay_steps = None
  config.train.init = STAGES[stage]  # all of it: the same model
  return config
