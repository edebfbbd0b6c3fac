"""The demo: DP-Cap on `scenes` at epsilon 8, in minutes on two CPU cores."""

from dpcap import config as config_lib
from dpcap import data


def get_config(label='count'):
  """The argument is what the probes ask of an image: count, color, shape or color_shape."""
  config = config_lib.base_config()

  config.model.size = 'demo'

  # A larger N means less noise at the same epsilon, and `scenes` has any N.
  config.data.source = config_lib.source_config('scenes', split='train', size=1_000_000)
  config.data.image_size = 32
  config.data.text_length = 24
  config.data.tokenizer = 'wordpiece'
  config.data.vocabulary = data.SCENES_VOCABULARY  # the words of the grammar, from no data
  # Captions tell left from right and name every object: neither mirror nor crop.
  config.data.crop_scale = None
  config.data.flip = False

  config.privacy.epsilon = 8.0
  config.privacy.expected_batch_size = 1024
  config.privacy.clip_norm = 1.0

  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup_steps = 40
  config.train.steps = 360
  config.train.checkpoint_every = 90
  config.train.log_every = 10
  config.mesh.physical_batch = 32
  config.mesh.batches_per_chunk = 8

  train = config_lib.source_config('scenes', split='validation', size=10_000, label=label)
  test = config_lib.source_config('scenes', split='test', size=5_000, label=label)
  config.evals.update(config_lib.probes_beside_baselines(train, test))
  config.evals.captions = config_lib.evaluator_config('captions', source=test, images=24)

  pair = dict(train=train, test=test)
  config.evals.few_shot = config_lib.evaluator_config('few_shot', **pair)
  config.evals.nearest_neighbours = config_lib.evaluator_config('knn', **pair)
  config.evals.private_probe = config_lib.evaluator_config('private_probe', **pair)

  some = config_lib.source_config('scenes', split='test', size=1_000, label='color')
  config.evals.zero_shot = config_lib.evaluator_config(
    'zero_shot', source=some, templates=('a large {}',)
  )
  config.evals.retrieval = config_lib.evaluator_config('retrieval', source=some)
  for about in ('attributes', 'relations', 'order'):
    config.evals[f'aro_{about}'] = config_lib.evaluator_config(
      'aro_scenes', source=some, test=about
    )
  return config
