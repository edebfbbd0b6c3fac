"""ARO: does the captioner tell the true caption from false ones of the same words?"""

from tools.reproduce_parts.scales import STAGE
from tools.reproduce_parts.table import Row, Table, above_chance

_MODELS = (('Cap, no privacy', 'dpcap:nonprivate'), ('DP-Cap', 'dpcap:base'))
_TESTS = {
  'paper': ('relation', 'attribution', 'coco_order', 'flickr30k_order'),
  'cpu': ('relations', 'attributes', 'order'),
  'smoke': ('relations', 'attributes', 'order'),
}


def _rows(scale):
  return [
    Row(name, f'{run},{STAGE[scale]}', f'aro_{test}', test.replace('_', ' '))
    for test in _TESTS[scale]
    for name, run in _MODELS
  ]


def _findings(rows):
  return [
    above_chance(f'DP-Cap is above chance at {row["group"]}', row)
    for row in rows
    if row['name'] == 'DP-Cap'
  ]


TABLE = Table('Compositional understanding (ARO)', _rows, _findings)
