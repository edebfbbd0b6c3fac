"""DP-Cap on your own image-text pairs in tar shards (img2dataset or webdataset layout).

    python -m dpcap.train --config=configs/tar_shards.py --workdir=runs/mine \\
        --config.data.source.path=/data/shards
"""

from dpcap import config as config_lib


def get_config(size='nano'):
  """Set `data.source.path`; scale size, batch and steps with what you have."""
  config = config_lib.base_config()

  config.model.size = size

  config.data.source = config_lib.source_config('tar_shards', path='', caption_key='txt')
  config.data.image_size = 224
  config.data.text_length = 64
  config.data.tokenizer = 'bytes'

  config.privacy.epsilon = 8.0
  config.privacy.expected_batch_size = 4096

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 50
  config.train.steps = 500
  return config
