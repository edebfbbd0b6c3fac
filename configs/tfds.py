"""DP-Cap on a TFDS data set that is prepared as array_record, captions made from labels.

    python -m dpcap.train --config=configs/tfds.py:imagenet2012 --workdir=runs/imagenet \\
        --config.data.source.data_dir=/data/tensorflow_datasets
"""

from dpcap import config as config_lib


def get_config(dataset='imagenet2012'):
  """The argument is the data set; one with captions takes `data.source.caption_key`."""
  config = config_lib.base_config()

  config.model.size = 'tiny'

  config.data.source = config_lib.source_config(
    'tfds', dataset=dataset, split='train', caption_template='this is a photo of a {}'
  )
  config.data.image_size = 224
  config.data.text_length = 40
  config.data.tokenizer = 'bytes'

  config.privacy.epsilon = 8.0
  config.privacy.expected_batch_size = 32_768

  config.optimizer.learning_rate = 5e-4
  config.optimizer.warmup_steps = 200
  config.train.steps = 2_000

  config.evals.linear_probe = config_lib.evaluator_config(
    'linear_probe',
    train=config_lib.source_config('tfds', dataset=dataset, split='train'),
    test=config_lib.source_config('tfds', dataset=dataset, split='validation'),
  )
  return config
