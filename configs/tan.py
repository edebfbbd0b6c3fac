"""TAN's classifiers, trained privately from scratch (Sander et al. 2023, arXiv 2210.03403).

    --config=configs/tan.py:cifar10           WRN-16-4, epsilon 7.10 by RDP
    --config=configs/tan.py:imagenet          NF-ResNet-50, epsilon 7.98 by RDP
    --config=configs/tan.py:imagenet,simulated      what the paper tunes with: no guarantee

With `calibrated`, sigma is that of the PLD accountant at epsilon 8.
"""

from configs.dpcap import NOISE
from dpcap import config as config_lib

DATASETS = ('cifar10', 'imagenet')
SIMULATION = {'real': None, 'simulated': 128}  # ImageNet's batch becomes 256


def get_config(argument=''):
  """Words of DATASETS, NOISE and SIMULATION, parted by commas."""
  dataset, noise, simulation = config_lib.read_words(argument, DATASETS, NOISE, SIMULATION)
  config = config_lib.base_config()
  (_cifar10 if dataset == 'cifar10' else _imagenet)(config)
  config.data.source = config_lib.dataset_config(dataset, 'train')
  config.data.crop_scale = None
  config.data.flip = True
  config.data.workers = 16
  config.privacy.clip_norm = 1.0
  if NOISE[noise]:
    config.privacy.epsilon, config.privacy.noise_multiplier = 8.0, None
  config.privacy.simulation_divisor = SIMULATION[simulation]
  config.optimizer.name = 'sgd'
  config.optimizer.schedule = 'constant'
  return config


def _cifar10(config):
  config.model = config_lib.model_config('wide_resnet', classes=10, depth=16, width=4, groups=16)
  config.data.dataset_size = 50_000
  config.data.image_size = 32
  config.data.pad_crop = 4
  config.data.views = 16
  config.privacy.expected_batch_size = 4_096
  config.privacy.noise_multiplier = 3.0
  config.privacy.delta = 1e-5
  config.optimizer.learning_rate = 4.0
  config.train.steps = 2_500
  config.train.ema_decay = 0.9999


def _imagenet(config):
  config.model = config_lib.model_config('nf_resnet', classes=1_000, depths=(3, 4, 6, 3))
  config.data.dataset_size = 1_281_167
  config.data.image_size = 224
  config.data.pad_crop = 20
  config.data.color_jitter = (0.8, 0.8, 0.8, 0.2, 0.3)
  config.data.views = 8
  config.privacy.expected_batch_size = 32_768
  config.privacy.noise_multiplier = 2.5
  config.privacy.delta = 8e-7
  config.optimizer.learning_rate = 32.0
  config.train.steps = 18_000
  config.train.ema_decay = 0.99999
