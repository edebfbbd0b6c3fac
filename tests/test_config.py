"""The schema refuses what does not fit, in one line that names key, value and what is allowed."""

import importlib
import json
import math

import pytest

from dpcap import config as config_lib
from dpcap import models
from dpcap.errors import UserError
from tests import tiny

_EXPERIMENTS = [
  'demo',
  'dpcap',
  'dpcap:large',
  'dpcap:epsilon2,1percent,calibrated',
  'dpcap:nonprivate,tiny',
  'dpcap:simulated',
  'dpcap:synthetic',
  'vip:small,calibrated,synthetic',
  'vip:script',
  'mae:tiny',
  'textures',
  'textures:small,for_vip',
  'tan:cifar10',
  'tan:imagenet,calibrated',
  'scenes:vip,count_linear_probe',
  'scenes:smoke,textures',
  'emoji',
  'evaluations:cifar100@dpcap:large',
  'evaluations:cifar10@tan:cifar10',
  'evaluations:places205,/data/places205',
  'evaluations:aro,/data/aro',
  'scenes:dpcap,large,epsilon1,count_linear_probe,aro_order',
  'scenes:smoke,dpcap,1percent,color_zero_shot,shape_few_shot',
  'tar_shards',
  'tar_shards:base',
  'tfds',
]


@pytest.mark.parametrize('experiment', _EXPERIMENTS)
def test_every_experiment_fits_the_schema(experiment):
  name, _, argument = experiment.partition(':')
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config(*([argument] if argument else []))
  if name == 'tar_shards':
    config.data.source.path = 'given'  # by whoever starts it
  config_lib.validate(config)


@pytest.mark.parametrize(
  'path,value,parts',
  [
    ('privacy.epsilom', 3.0, ['privacy.epsilom', 'did you mean epsilon']),
    ('surprise', 1, ['surprise', 'no key']),
    ('privacy.delta', 1.0, ['privacy.delta', '1.0', 'below 1']),
    ('privacy.delta', 0.0, ['privacy.delta', 'above 0']),
    ('privacy.epsilon', 2.0, ['privacy.epsilon', 'privacy.noise_multiplier', 'exactly one']),
    ('privacy.noise_multiplier', None, ['exactly one']),
    ('privacy.noise_multiplier', math.nan, ['noise_multiplier', 'nan', 'above 0']),
    ('privacy.clip_norm', '1', ['privacy.clip_norm', "'1'", 'float']),
    ('privacy.clip_norm', None, ['privacy.clip_norm', 'None']),
    ('privacy.expected_batch_size', 2.5, ['expected_batch_size', '2.5', 'int']),
    ('privacy.expected_batch_size', True, ['expected_batch_size', 'True', 'int']),
    (
      'privacy.sampler',
      'bernoulli',
      ['privacy.sampler', "'bernoulli'", 'poisson, truncated_poisson, shuffle'],
    ),
    ('privacy.accountant', 'prv', ["'prv'", 'pld, rdp']),
    ('privacy.clipping', 'none', ["'none'", 'vmap', 'auto']),
    ('privacy.clip_function', 'tanh', ["'tanh'", 'clip, automatic']),
    ('privacy.gamma', 0.1, ['privacy.gamma', "'automatic'"]),
    ('privacy.gamma', 0.0, ['privacy.gamma', 'above 0']),
    ('privacy.adjacency', 'replace_one', ["'replace_one'", 'zero_out']),
    ('privacy.mechanism', 'none', ['privacy.mechanism', 'epsilon=inf']),
    ('data.image_size', 20, ['image_size', '20', 'patch size, 8']),
    ('data.crop_scale', (0.5, 0.2), ['data.crop_scale', '(0.5, 0.2)']),
    ('data.flip', 1, ['data.flip', '1', 'bool']),
    (
      'data.source.name',
      'laion',
      ['data.source.name', "'laion'", 'scenes, textures, tar_shards, image_folder, tfds'],
    ),
    ('data.source.split', 'dev', ['data.source.split', "'dev'"]),
    ('data.source.path', '/x', ['data.source.path', 'no key']),
    ('optimizer.warmup_steps', 6, ['optimizer.warmup_steps', '6', 'train.steps']),
    ('optimizer.momentum', 0.9, ['optimizer.momentum', '0.9', "name 'sgd' only", "'adamw'"]),
    ('optimizer.name', 'adam', ['optimizer.name', "'adam'", 'adamw, sgd']),
    ('optimizer', {'name': 'sgd', 'b2': 0.5}, ['optimizer.b2', '0.5', "name 'adamw' only"]),
    (
      'optimizer',
      {'schedule': 'constant', 'decay_steps': 9},
      ['optimizer.decay_steps', '9', "schedule 'cosine' only", "'constant'"],
    ),
    ('train.steps', 0, ['train.steps', '0', 'above 0']),
    ('train.ema_decay', 1.0, ['train.ema_decay', '1.0', 'below 1']),
    ('data.views', 0, ['data.views', '0', 'above 0']),
    ('model.name', 'perceptron', ['model.name', "'perceptron'", 'captioner']),
    ('model.classes', 10, ['model.classes', 'no key']),
    (
      'evals.own',
      config_lib.evaluator_config('accuracy', source=tiny.get_config().data.source).to_dict(),
      ['evals.own.name', "'accuracy'", 'logits', 'wide_resnet', "'captioner'"],
    ),
    ('evals.probe', {'name': 'k_means'}, ['evals.probe.name', "'k_means'", 'linear_probe']),
  ],
)
def test_bad_values_are_refused(path, value, parts):
  config = tiny.get_config().to_dict()
  *sections, key = path.split('.')
  section = config
  for name in sections:
    section = section[name]
  section[key] = section[key] | value if key == 'optimizer' else value
  with pytest.raises(UserError) as e:
    config_lib.validate(config_lib.ml_collections.ConfigDict(config))
  for part in parts:
    assert part in str(e.value)
  assert '\n' not in str(e.value)


def test_layers_that_the_model_has_not_are_refused():
  scenes = config_lib.source_config('scenes')
  sources = dict(train=scenes, test=scenes)
  for name, options in (
    ('knn', {}),
    ('linear_probe_sgd', {}),
    ('linear_probe', dict(features='pixels')),
  ):
    config = tiny.get_config()
    entry = config_lib.evaluator_config(name, **sources, **options, layers='blocks')
    config.evals = {'mine': entry}
    said = 'pixels has none' if options else 'those of the Captioner are memory, encoder'
    with pytest.raises(UserError, match=f"evals.mine: layers is 'blocks'; .*{said}"):
      config_lib.validate(config)
    config.evals.mine.layers = None if options else 'all_blocks'
    config_lib.validate(config)


def test_missing_key_is_named():
  config = tiny.get_config().to_dict()
  del config['train']['steps']
  with pytest.raises(UserError, match='train.steps is missing'):
    config_lib.validate(config_lib.ml_collections.ConfigDict(config))


def test_fixed_part_holds_what_bears_on_the_computation():
  config = tiny.get_config()
  fixed = config_lib.fixed_part(config_lib.to_json(config))
  assert fixed['privacy.noise_multiplier'] == 4.0 and fixed['data.source.size'] == 400
  for free in ('data.workers', 'train.log_every', 'mesh.physical_batch'):
    assert free not in fixed
  assert json.loads(config_lib.to_json(config))['model']['size'] == 'micro'


def test_defaults_are_valid_and_sizes_known():
  config = config_lib.base_config()
  config.data.source = config_lib.source_config('scenes')
  config.privacy.epsilon = math.inf
  config_lib.validate(config)
  assert config.model.size in models.SIZES


def test_words_of_an_argument_choose_one_of_each_family():
  families = ('base', 'large'), {'epsilon8': 8.0, 'epsilon2': 2.0}
  assert config_lib.read_words('', *families) == ['base', 'epsilon8']
  assert config_lib.read_words('epsilon2', *families) == ['base', 'epsilon2']
  assert config_lib.read_words('epsilon2,large', *families) == ['large', 'epsilon2']
  with pytest.raises(UserError, match="'huge' is no word .* one of each: base, large; epsilon8"):
    config_lib.read_words('huge', *families)
  with pytest.raises(UserError, match="'large' and 'base' exclude each other"):
    config_lib.read_words('base,large', *families)


def test_a_classifier_is_judged_on_its_own_task():
  evals = lambda what: importlib.import_module('configs.evaluations').get_config(what).evals
  assert 'cifar10_accuracy' in evals('cifar10@tan:cifar10')
  for what in ('cifar100@tan:cifar10', 'cifar10'):
    assert not [name for name in evals(what) if name.endswith('accuracy')]


def test_evaluations_of_an_experiment_that_is_not_there_are_refused():
  with pytest.raises(UserError, match="experiment is 'dpkap:base'"):
    importlib.import_module('configs.evaluations').get_config('cifar100@dpkap:base')


def test_unknown_source_evaluator_variant_are_refused():
  for make in (
    lambda: config_lib.source_config('laion'),
    lambda: config_lib.source_config('scenes', sise=3),
    lambda: config_lib.evaluator_config('k_means'),
    lambda: config_lib.choose('part', '3percent', {'1percent': 1}),
  ):
    with pytest.raises(UserError, match='allowed'):
      make()
