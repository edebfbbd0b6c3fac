"""Linear probes on frozen features: private models, others, and what no training data made."""

from tools.reproduce_parts.scales import DATASETS, STAGE
from tools.reproduce_parts.table import Row, Table, above, find

_MODELS = (
  # name, run, the paper's figure on ImageNet-1K
  ('Cap, no privacy', 'dpcap:nonprivate', None),
  ('MAE, no privacy', 'mae:base', None),
  ('ViP', 'vip:base', 0.565),
  ('DP-Cap', 'dpcap:base', None),
  ('DP-Cap Large', 'dpcap:large', 0.658),
)
_ABSTRACT = 'DP-Cap Large and ViP on ImageNet-1K: Sander et al. 2024, abstract'
_BASELINES = (('untrained encoder', 'untrained'), ('HOG', 'hog'), ('pixels', 'pixels'))


def _rows(scale):
  rows, first = [], DATASETS[scale][0]
  staged = lambda run: run if run.startswith('mae') else f'{run},{STAGE[scale]}'
  for dataset in DATASETS[scale]:
    for name, run, paper in _MODELS:
      known = dict(paper=paper, source=_ABSTRACT) if paper and dataset == first else {}
      rows.append(Row(name, staged(run), f'{dataset}_linear_probe', dataset, **known))
    # Probes of all blocks stand by themselves: they are not to be compared with the others.
    for name, run, _ in _MODELS if dataset == first else ():
      if scale != 'paper' or run.startswith(('vip', 'mae')):
        rows.append(Row(name, staged(run), f'{dataset}_all_blocks', f'{dataset}, all blocks'))
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
    if (row['name'] == 'ViP' or row['epsilon'] == 0) and _has(rows, 'DP-Cap', row['group'])
  ]


def _has(rows, name, group):
  return any((row['name'], row['group']) == (name, group) for row in rows)


TABLE = Table('Linear probes', _rows, _findings)
