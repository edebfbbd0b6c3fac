"""More pairs at the same epsilon, 8, with the batch in proportion."""

from tools.reproduce_parts.scales import DATASETS, STAGE
from tools.reproduce_parts.table import Row, Table, above

_SHARES = ('1percent', '10percent', '100percent')


def _rows(scale):
  dataset = DATASETS[scale][0]
  return [
    Row(
      f'{share.removesuffix("percent")}%',
      f'dpcap:{share},calibrated,{STAGE[scale]}',
      f'{dataset}_linear_probe',
      dataset,
    )
    for share in _SHARES
  ]


def _findings(rows):
  return [above('more data help at the same epsilon', rows[-1], rows[0])]


TABLE = Table('Share of the data', _rows, _findings)
