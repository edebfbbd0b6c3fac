"""How much features are worth at each epsilon, and without privacy."""

from tools.reproduce_parts.scales import DATASETS, STAGE
from tools.reproduce_parts.table import Finding, Row, Table, above, find

_RUNS = (
  ('epsilon 1', 'dpcap:epsilon1'),
  ('epsilon 2', 'dpcap:epsilon2'),
  ('epsilon 8', 'dpcap:base'),
  ('no privacy', 'dpcap:nonprivate'),
)


def _rows(scale):
  dataset = DATASETS[scale][0]
  return [
    Row(name, f'{run},{STAGE[scale]}', f'{dataset}_linear_probe', dataset) for name, run in _RUNS
  ]


def _findings(rows):
  name = 'the gap to the non-private Cap closes as epsilon grows'
  most, least, cap = (find(rows, which) for which in ('epsilon 8', 'epsilon 1', 'no privacy'))
  closes = above(name, most, least)
  if None in (most['value'], least['value'], cap['value']):
    return [closes]
  gaps = ', '.join(
    f'{cap["value"] - row["value"]:.1%} at {row["name"]}' for row in rows if row is not cap
  )
  return [Finding(name, closes.holds, f'{closes.why}; the gap is {gaps}')]


TABLE = Table('Epsilon', _rows, _findings)
