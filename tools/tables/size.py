"""Sizes of the model at epsilon 8."""

from tools.reproduce_parts.scales import DATASETS, STAGE
from tools.reproduce_parts.table import Row, Table, above

# Scaled down, there are fewer.
_SIZES = {
  'paper': ('tiny', 'small', 'base', 'large'),
  'cpu': ('tiny', 'base', 'large'),
  'smoke': ('tiny', 'base'),
}
_PAPER = {'large': (0.658, 'DP-Cap Large on ImageNet-1K: Sander et al. 2024, abstract')}


def _rows(scale):
  dataset = DATASETS[scale][0]
  rows = []
  for size in _SIZES[scale]:
    paper, source = _PAPER.get(size, (None, None))
    run = f'dpcap:{size},{STAGE[scale]}'
    rows.append(Row(size, run, f'{dataset}_linear_probe', dataset, paper=paper, source=source))
  return rows


def _findings(rows):
  return [above('a larger model is better at the same epsilon', rows[-1], rows[0])]


TABLE = Table('Size of the model', _rows, _findings)
