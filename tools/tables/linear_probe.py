"""Linear probes on frozen features: private models, others, and what no training data made."""

from tools.reproduce_parts.scales import DATASETS
from tools.reproduce_parts.table import Row, Table, above, find

_MODELS = (
  # name, run, the paper's figure on ImageNet-1K and where it stands
  ('Cap, no privacy', 'dpcap:nonprivate', None, None),
  ('DP-Cap', 'dpcap:base', None, None),
  ('DP-Cap Large', 'dpcap:large', 0.658, 'DP-Cap Large on ImageNet-1K: Sander et al. 2024, abstract'),
)
_BASELINES = (('untrained encoder', 'untrained'), ('HOG', 'hog'), ('pixels', 'pixels'))


def _rows(scale):
  rows, first = [], DATASETS[scale][0]
  for dataset in DATASETS[scale]:
    for name, run, paper, source in _MODELS:
      known = dict(paper=paper, source=source) if dataset == first else {}
      rows.append(Row(name, run, f'{dataset}_linear_probe', dataset, **known))
    # The paper's protocol probes augmented views, of the model only.
    for name, features in _BASELINES if scale != 'paper' else ():
      rows.append(Row(name, 'dpcap:base', f'{dataset}_{features}', dataset, trained=False))
  return rows


def _findings(rows):
  return [
    above(
      f'{row["group"]}: DP-Cap at epsilon 8 is above {row["name"]}',
      find(rows, 'DP-Cap', row['group']),
      row,
    )
    for row in rows
    if row['epsilon'] == 0
  ]


TABLE = Table('Linear probes', _rows, _findings)
