"""The paper's evaluations of a run on a data set of the catalogue, or on ARO's tests.

    python -m dpcap.evaluate --config=configs/evaluations.py:cifar100 --workdir=runs/dpcap \\
        --config.data.workers=16
    python -m dpcap.evaluate --config=configs/evaluations.py:places205,/data/places205 ...
    python -m dpcap.evaluate --config=configs/evaluations.py:imagenet@dpcap:large ...

What follows the @ is the experiment that was trained, a file of configs/ with its argument; without
it the main run of dpcap.py. TFDS data sets must have been prepared as array_record; others are
image folders, whose place follows the name (else it is the name). ImageNet's readable class names
come with its download: give evals.imagenet_zero_shot.labels_file. That a run on tar shards is apart
from these cannot be seen; say --config.evals.NAME.apart=True where you know it, or the results are
private.
"""

import importlib
import pathlib

from dpcap import config as config_lib
from dpcap import data
from dpcap.errors import UserError

_SHOTS = {'aircraft': (10, 20, 30), 'caltech101': (5, 10, 30), 'cifar100': (5, 10, 30)}


def get_config(argument='imagenet'):
  """The argument is NAME of the catalogue, NAME,FOLDER for image folders, or aro,FOLDER."""
  what, _, experiment = argument.partition('@')
  dataset, _, folder = what.partition(',')
  config = _experiment(experiment or 'dpcap')
  config.evals = config_lib.ml_collections.ConfigDict()  # in place of the experiment's own
  if dataset == 'aro':
    _add_aro(config, folder or 'aro')
    return config
  in_folders = data.find_dataset(dataset).source['name'] == 'image_folder'
  where = {'path': folder or dataset} if folder or in_folders else {}
  train = config_lib.dataset_config(dataset, 'train', **where)
  test = config_lib.dataset_config(dataset, 'test', **where)
  pair = dict(train=train, test=test)

  config.evals[f'{dataset}_linear_probe'] = config_lib.evaluator_config('linear_probe_sgd', **pair)
  config.evals[f'{dataset}_few_shot'] = config_lib.evaluator_config(
    'few_shot', **pair, shots=_SHOTS.get(dataset, (1, 2, 5, 10))
  )
  if 'classes' in config.model and train == config.data.source:  # what it was trained for
    config.evals[f'{dataset}_accuracy'] = config_lib.evaluator_config('accuracy', source=test)
  if config.model.name == 'mae':  # what ViP's own figures are of
    config.evals[f'{dataset}_all_blocks'] = config_lib.evaluator_config(
      'linear_probe_sgd', **pair, layers='all_blocks'
    )
  if config.model.name == 'captioner':
    config.evals[f'{dataset}_zero_shot'] = config_lib.evaluator_config(
      'zero_shot',
      source=test,
      dataset=dataset,
      templates=('this is a photo of a {}',),
      labels_file='LOC_synset_mapping.txt' if data.find_dataset(dataset).names else None,
    )
  return config


def _add_aro(config, folder):
  """ARO's four tests: its JSON files and the folder `images` stand in `folder`."""
  for test in ('relation', 'attribution'):
    config.evals[f'aro_{test}'] = config_lib.evaluator_config(
      'aro_visual_genome',
      annotations=f'{folder}/visual_genome_{test}.json',
      images=f'{folder}/images',
    )
  for test in ('coco', 'flickr30k'):
    config.evals[f'aro_{test}_order'] = config_lib.evaluator_config(
      'aro_order', annotations=f'{folder}/dataset_{test}.json', images=f'{folder}/{test}'
    )


def _experiment(name):
  file, _, argument = name.partition(':')
  if not pathlib.Path(__file__).with_name(f'{file}.py').exists():
    raise UserError(f'experiment is {name!r}; it must be FILE or FILE:ARGUMENT of configs/')
  module = importlib.import_module(f'configs.{file}')
  return module.get_config(argument) if argument else module.get_config()
