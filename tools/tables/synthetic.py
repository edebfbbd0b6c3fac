"""Starting from a masked autoencoder of generated textures, against starting from nothing."""

from tools.reproduce_parts.scales import DATASETS
from tools.reproduce_parts.table import Row, Table, above, find

_RUNS = (
  ('DP-Cap from scratch', 'dpcap:base'),
  ('DP-Cap from the stage', 'dpcap:base,synthetic'),
  ('ViP from scratch', 'vip:base'),
  ('ViP from the stage', 'vip:base,synthetic'),
  ('the stage alone', 'textures:base,for_vip'),
)
_FINDINGS = (
  ('the synthetic stage helps DP-Cap', 'DP-Cap from the stage', 'DP-Cap from scratch'),
  ('the synthetic stage helps ViP', 'ViP from the stage', 'ViP from scratch'),
  ('private training adds to the synthetic stage', 'ViP from the stage', 'the stage alone'),
)


def _rows(scale):
  dataset = DATASETS[scale][0]
  return [Row(name, run, f'{dataset}_linear_probe', dataset) for name, run in _RUNS]


def _findings(rows):
  return [above(name, find(rows, a), find(rows, b)) for name, a, b in _FINDINGS]


TABLE = Table('The synthetic stage', _rows, _findings)
