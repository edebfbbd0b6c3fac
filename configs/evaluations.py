"""The paper's evaluations of a run of configs/dpcap.py on a data set of the catalogue.

    python -m dpcap.evaluate --config=configs/evaluations.py:cifar100 --workdir=runs/dpcap \\
        --config.data.workers=16
    python -m dpcap.evaluate --config=configs/evaluations.py:places205,/data/places205 ...

TFDS data sets must have been prepared as array_record; others are image folders, whose place
follows the name. ImageNet's readable class names come with its download: give
evals.zero_shot.labels_file. That a run on tar shards is apart from these cannot be seen; say
--config.evals.NAME.apart=True where you know it, or the results are private.
"""

from configs import dpcap
from dpcap import config as config_lib
from dpcap import data


def get_config(argument='imagenet'):
  """The argument is NAME of the catalogue, or NAME,FOLDER for image folders."""
  dataset, _, folder = argument.partition(',')
  config = dpcap.get_config()
  where = {'path': folder} if folder else {}
  train = config_lib.dataset_config(dataset, 'train', **where)
  test = config_lib.dataset_config(dataset, 'test', **where)
  pair = dict(train=train, test=test)

  config.evals.linear_probe = config_lib.evaluator_config('linear_probe_sgd', **pair)
  config.evals.few_shot = config_lib.evaluator_config('few_shot', **pair)
  config.evals.zero_shot = config_lib.evaluator_config(
    'zero_shot',
    source=test,
    dataset=dataset,
    templates=('this is a photo of a {}',),
    labels_file='LOC_synset_mapping.txt' if data.find_dataset(dataset).names else None,
  )
  return config
