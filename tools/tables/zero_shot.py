"""The captioner as a classifier: the label with the lowest mean token loss."""

from tools.reproduce_parts.scales import STAGE
from tools.reproduce_parts.table import Row, Table, above_chance

_MODELS = (('Cap, no privacy', 'dpcap:nonprivate'), ('DP-Cap', 'dpcap:base'))
_DATASETS = {
  'paper': ('imagenet', 'cifar10', 'cifar100'),
  'cpu': ('color',),
  'smoke': ('color',),
}


def _rows(scale):
  return [
    Row(name, f'{run},{STAGE[scale]}', f'{dataset}_zero_shot', dataset)
    for dataset in _DATASETS[scale]
    for name, run in _MODELS
  ]


def _findings(rows):
  return [
    above_chance(f'DP-Cap classifies {row["group"]} better than chance', row)
    for row in rows
    if row['name'] == 'DP-Cap'
  ]


TABLE = Table('Zero-shot classification', _rows, _findings)
