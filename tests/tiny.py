"""A run that takes seconds: scenes of 16 px, a few steps. Also a config file for subprocesses."""

from dpcap import config as config_lib
from dpcap import data

STEPS = 6


def get_config():
  """Deterministic (fixed seed), no worker processes."""
  config = config_lib.base_config()
  config.model.size = 'micro'
  config.data.source = config_lib.source_config('scenes', split='train', size=400)
  config.data.image_size = 16
  config.data.text_length = 8
  config.data.tokenizer = 'wordpiece'
  config.data.vocabulary = data.SCENES_VOCABULARY
  config.data.crop_scale = None
  config.data.flip = False
  config.data.workers = 0
  config.privacy.noise_multiplier = 4.0  # a small epsilon is computed in less time
  config.privacy.expected_batch_size = 20
  config.privacy.seed = 0
  config.privacy.check_clipping = False  # it costs each run seconds; test_loop.py tests it
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 1
  # Run where train.evaluate_at says so.
  test = config_lib.source_config('scenes', split='test', size=6)
  config.evals.written = config_lib.evaluator_config(
    'captions', source=test, images=5, batch_size=4
  )
  config.mesh.physical_batch = 8
  config.mesh.batches_per_chunk = 2
  config.train.steps = STEPS
  config.train.ema_decay = 0.5  # what is resumed and evaluated is more with an average
  config.train.checkpoint_every = 2
  config.train.log_every = 1
  return config
