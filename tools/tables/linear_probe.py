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
_BASELINES = {'untrained encoder': 'untrained', 'HOG': 'hog', 'pixels': 'pixels'}


def _rows(scale):
  rows, first = [], DATASETS[scale][0]
  for dataset in DATASETS[scale]:
    rows += _models(scale, dataset, 'linear_probe', dataset)
    if dataset == first:  # what ViP probes
      rows += _models(scale, dataset, 'all_blocks', f'{dataset}, all blocks')
    # The paper's protocol probes augmented views, of the model only.
    if scale != 'paper':
      rows += _baselines(dataset, dataset, _BASELINES)
    # The mean over few patches loses where things are, which HOG and pixels keep.
    if scale == 'cpu':
      group = f'{dataset}, grid'
      rows += _models(scale, dataset, 'grid', group)
      rows += _baselines(dataset, group, _BASELINES | {'untrained encoder': 'untrained_grid'})
  return rows


def _models(scale, dataset, evaluation, group):
  """Rows of all models that have the evaluation; groups are never compared with each other."""
  rows = []
  for name, run, paper in _MODELS:
    if scale == 'paper' and evaluation == 'all_blocks' and not run.startswith(('vip', 'mae')):
      continue
    words = run if run.startswith('mae') else f'{run},{STAGE[scale]}'
    known = {}
    if paper and group == DATASETS[scale][0]:
      known = dict(paper=paper, source=_ABSTRACT)
    rows.append(Row(name, words, f'{dataset}_{evaluation}', group, **known))
  return rows


def _baselines(dataset, group, evaluations):
  return [
    Row(name, 'dpcap:base', f'{dataset}_{evaluation}', group, trained=False)
    for name, evaluation in evaluations.items()
  ]


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
