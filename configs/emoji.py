"""DP-Cap on small images in tar shards with class labels: training and probing together.

python -m dpcap.train --config=configs/emoji.py:DIR --workdir=runs/emoji
python -m dpcap.evaluate --config=configs/emoji.py:DIR,all --workdir=runs/emoji
"""

from dpcap import config as config_lib
from dpcap.errors import UserError


def get_config(argument='emoji'):
  """The argument is the folder of train-*.tar and test-*.tar; FOLDER,all adds evaluations."""
  folder, _, more = argument.partition(',')
  if more not in ('', 'all'):
    raise UserError(f'argument of emoji.py is {argument!r}; allowed: FOLDER, FOLDER,all')
  config = config_lib.base_config()

  config.model.size = 'demo'

  train = config_lib.source_config(
    'tar_shards', path=f'{folder}/train-*.tar', caption_key='txt', label_key='label'
  )
  test = config_lib.source_config(
    'tar_shards', path=f'{folder}/test-*.tar', caption_key='txt', label_key='label'
  )
  config.data.source = train
  config.data.image_size = 32
  config.data.text_length = 40
  config.data.tokenizer = 'bytes'
  config.data.crop_scale = (0.6, 1.0)

  config.privacy.epsilon = 8.0
  config.privacy.expected_batch_size = 512

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 20
  config.train.steps = 200
  config.mesh.physical_batch = 32

  config.evals.update(config_lib.probes_beside_baselines(train, test))
  config.evals.captions = config_lib.evaluator_config('captions', source=test, images=24)
  if more:
    add_evaluations(config, train, test)
  return config


def add_evaluations(config, train, test):
  """All that work on labelled images, where the default takes probes and a few captions."""
  pair = dict(train=train, test=test)
  config.evals.probe_of_views = config_lib.evaluator_config(
    'linear_probe_sgd',
    **pair,
    epochs=10,
    warmup_epochs=1,
    base_learning_rates=(0.1, 1.0, 10.0),
    probe_batch_size=512,
  )
  config.evals.fine_tuned = config_lib.evaluator_config(
    'fine_tune',
    **pair,
    epochs=8,
    warmup_epochs=1,
    base_learning_rate=4e-3,
    layer_decay=0.9,
    train_batch_size=128,
  )
  config.evals.private_probe = config_lib.evaluator_config('private_probe', **pair)
  config.evals.few_shot = config_lib.evaluator_config('few_shot', **pair)
  config.evals.nearest_neighbours = config_lib.evaluator_config('knn', **pair)
  config.evals.class_means = config_lib.evaluator_config('nearest_class_mean', source=test)
  config.evals.retrieval = config_lib.evaluator_config('retrieval', source=test)
  config.evals.caption_retrieval = config_lib.evaluator_config('caption_retrieval', source=test)
  config.evals.zero_shot = config_lib.evaluator_config(
    'zero_shot', source=test, templates=('{}', 'an emoji of {}')
  )
  for method in ('greedy', 'beam', 'nucleus'):
    config.evals[f'captions_{method}'] = config_lib.evaluator_config(
      'captions', source=test, images=256, method=method
    )
