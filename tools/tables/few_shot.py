"""Few-shot probes: logistic regression on k images of each class."""

from tools.reproduce_parts.scales import STAGE
from tools.reproduce_parts.table import Row, Table, above, find

_MODELS = (('Cap, no privacy', 'dpcap:nonprivate'), ('ViP', 'vip:base'), ('DP-Cap', 'dpcap:base'))
_SHOTS = {
  'paper': {
    'imagenet': (1, 2, 5, 10),
    'aircraft': (10, 20, 30),
    'caltech101': (5, 10, 30),
    'cifar100': (5, 10, 30),
  },
  'cpu': {'count': (1, 2, 5, 10), 'shape': (1, 2, 5, 10)},
  'smoke': {'count': (1, 2, 5, 10)},
}


def _rows(scale):
  return [
    Row(
      name,
      f'{run},{STAGE[scale]}',
      f'{dataset}_few_shot',
      f'{dataset}, {shots} per class',
      shots,
    )
    for dataset, numbers in _SHOTS[scale].items()
    for shots in numbers
    for name, run in _MODELS
  ]


def _findings(rows):
  return [
    above(f'{group}: DP-Cap is above ViP', *(find(rows, name, group) for name in ('DP-Cap', 'ViP')))
    for group in dict.fromkeys(row['group'] for row in rows)
  ]


TABLE = Table('Few-shot probes', _rows, _findings)
