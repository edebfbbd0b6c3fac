"""Few-shot probes: logistic regression on k images of each class."""

from tools.reproduce_parts.table import Row, Table, above

_MODELS = (('Cap, no privacy', 'dpcap:nonprivate'), ('DP-Cap', 'dpcap:base'))
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
    Row(name, run, f'{dataset}_few_shot', f'{dataset}, {shots} per class', shots)
    for dataset, numbers in _SHOTS[scale].items()
    for shots in numbers
    for name, run in _MODELS
  ]


def _findings(rows):
  own = [row for row in rows if row['name'] == 'DP-Cap']
  first = [row for row in own if row['group'].split(',')[0] == own[0]['group'].split(',')[0]]
  name = 'DP-Cap gains from more images of a class'
  return [above(name, _told_by_group(first[-1]), _told_by_group(first[0]))]


def _told_by_group(row):
  return row | {'name': row['group']}


TABLE = Table('Few-shot probes', _rows, _findings)
