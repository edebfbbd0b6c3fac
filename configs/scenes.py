"""The study on two CPU cores: any experiment of configs/, scaled down to `scenes`.

    --config=configs/scenes.py:dpcap,base,epsilon2                    trains
    --config=configs/scenes.py:dpcap,base,epsilon2,count_linear_probe   evaluates
    --config=configs/scenes.py:vip,small                              another experiment
    --config=configs/scenes.py:smoke,dpcap                            in seconds, learns nothing

The first words are the file and its argument; data, model and recipe are those of demo.py, its
learning rate too, and the experiment's share of the data, batch, steps, epsilon and size are kept in
proportion to its main run. Noise is calibrated to the experiment's epsilon: the paper's sigma belongs
to its N.
"""

import importlib

from configs import demo
from configs import dpcap as paper
from dpcap import config as config_lib
from dpcap.errors import UserError

EXPERIMENTS = ('dpcap', 'vip', 'mae', 'textures')  # files of configs/
SCALES = ('cpu', 'smoke')

# The paper's sizes; width grows with them, by half the way.
_SIZES = {'nano': 'micro', 'tiny': 'micro', 'small': 'demo', 'base': 'demo', 'large': 'demo_wide'}

# name -> features, and layers of a model's
_PROBES = {
  'linear_probe': ('model', None),
  'all_blocks': ('model', 'all_blocks'),
  'grid': ('model', 'grid'),
  'untrained_grid': ('untrained', 'grid'),
  'untrained': ('untrained', None),
  'hog': ('hog', None),
  'pixels': ('pixels', None),
}
_LABELS = ('count', 'shape', 'color', 'color_shape')
EVALUATIONS = (
  *(f'{label}_{what}' for label in _LABELS for what in (*_PROBES, 'few_shot')),
  'color_zero_shot',
  *(f'aro_{test}' for test in ('attributes', 'relations', 'order')),
)


def get_config(argument='dpcap'):
  """SCALE, an experiment's file and words, and any of EVALUATIONS, parted by commas."""
  words = argument.split(',')
  evaluations = [word for word in words if word in EVALUATIONS]
  own = [word for word in words if word in EXPERIMENTS or word in SCALES]
  experiment, scale = config_lib.read_words(','.join(own), EXPERIMENTS, SCALES)
  rest = [word for word in words if word not in (*EVALUATIONS, *own, 'calibrated')]
  full = importlib.import_module(f'configs.{experiment}')
  noise = ['calibrated'] if hasattr(full, 'NOISE') else []
  try:
    config = _scaled_down(full.get_config(','.join([*rest, *noise])), full.get_config())
  except UserError as e:
    own = ', '.join((*EXPERIMENTS, *SCALES))
    raise UserError(f'{e}; of scenes.py itself: {own}, and evaluations') from e
  if scale == 'smoke':
    _make_tiny(config)
  size = dict(cpu=(10_000, 5_000, 1_000), smoke=(200, 100, 40))[scale]
  config.evals = config_lib.ml_collections.ConfigDict()
  for name in evaluations:
    config.evals[name] = _evaluation(name, *size)
  return config


def _scaled_down(full, main):
  """The demo with what `full` has of its experiment's main run: sizes, shares, epsilon."""
  config = demo.get_config()
  config.model = full.model
  config.model.size = _SIZES[full.model.size]
  if full.model.name == 'mae':
    config.model.update(decoder_width=64, decoder_depth=1, decoder_heads=4)
  if full.data.source.name == 'textures':
    config.data.source = full.data.source
  else:
    share = full.data.dataset_size / paper.LAION_233M
    config.data.source.size = round(share * config.data.source.size)
  ratio = full.privacy.expected_batch_size / main.privacy.expected_batch_size
  config.privacy.expected_batch_size = round(ratio * config.privacy.expected_batch_size)
  config.privacy.epsilon = full.privacy.epsilon
  config.privacy.clip_norm = full.privacy.clip_norm
  config.privacy.simulation_divisor = full.privacy.simulation_divisor
  config.train.steps = round(config.train.steps * full.train.steps / main.train.steps)
  config.train.init, config.train.init_parts = full.train.init, full.train.init_parts
  return config


def _make_tiny(config):
  """A run of seconds with the same keys in force: four steps, 16 px, a tenth of the data."""
  config.model.size = 'micro'
  config.data.source.size //= 10
  config.data.image_size = 16
  config.data.text_length = 16
  config.data.workers = 0
  config.privacy.expected_batch_size = max(1, config.privacy.expected_batch_size // 8)
  config.privacy.accountant = 'rdp'  # the PLD takes longer than the run
  config.privacy.check_clipping = False
  config.optimizer.warmup_steps = 1
  config.train.steps = max(2, config.train.steps // 90)
  config.mesh.physical_batch = 8


def _evaluation(name, train_size, test_size, few):
  """An entry of `evals` on so many training and test images, `few` where each is read by words."""
  label = max((label for label in _LABELS if name.startswith(f'{label}_')), key=len, default='aro')
  what = name.removeprefix(f'{label}_')
  scenes = lambda split, size, label: config_lib.source_config(
    'scenes', split=split, size=size, label=label
  )
  if label == 'aro':
    return config_lib.evaluator_config(
      'aro_scenes', source=scenes('test', few, 'color'), test=what
    )
  if what == 'zero_shot':
    return config_lib.evaluator_config(
      'zero_shot', source=scenes('test', few, label), templates=('a large {}',)
    )
  pair = dict(
    train=scenes('validation', train_size, label), test=scenes('test', test_size, label)
  )
  if what == 'few_shot':
    return config_lib.evaluator_config('few_shot', **pair)
  features, layers = _PROBES[what]
  return config_lib.evaluator_config('linear_probe', **pair, features=features, layers=layers)
