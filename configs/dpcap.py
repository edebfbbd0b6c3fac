"""DP-Cap's main run (Sander et al. 2024, section 5): 233M image-text pairs at epsilon 8."""

from dpcap import config as config_lib

# Pairs in the paper's deduplicated and blurred subset of LAION-2B.
LAION_233M = 233_804_767


def get_config(size='base'):
  """`configs/dpcap.py:large` trains another size; the paper's main run is base."""
  config = config_lib.base_config()

  config.model.size = size

  config.data.source = config_lib.source_config('tar_shards', path='laion233m', caption_key='txt')
  config.data.dataset_size = LAION_233M
  config.data.image_size = 224
  config.data.text_length = 40
  config.data.tokenizer = 'wordpiece'
  config.data.vocabulary = 'bert-base-uncased-vocab.txt'
  config.data.crop_scale = (0.2, 1.0)
  config.data.flip = True
  config.data.workers = 16

  config.privacy.clip_norm = 1.0
  config.privacy.noise_multiplier = 0.728
  config.privacy.expected_batch_size = 1_310_720

  config.optimizer.learning_rate = 5.12e-4  # 1e-7 x batch / 256
  config.optimizer.warmup_steps = 2_000
  config.optimizer.decay_steps = 10_000  # the run is cut off at 5,708 of them
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.005

  config.train.steps = 5_708
  return config
