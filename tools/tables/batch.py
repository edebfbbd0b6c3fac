"""Batches at the same epsilon, 8: the noise of each is what that takes; and a TAN simulation."""

from tools.reproduce_parts.scales import DATASETS, STAGE
from tools.reproduce_parts.study import Study
from tools.reproduce_parts.table import Row, Table, above

_WORDS = ('batch20k', 'batch82k', 'batch328k', 'batch1m')


def _rows(scale):
  runs = {f'{word.removeprefix("batch")} of 1m': word for word in _WORDS}
  runs['simulation of 1m at a 64th'] = 'batch1m,simulated'
  dataset = DATASETS[scale][0]
  return [
    Row(name, f'dpcap:{words},calibrated,{STAGE[scale]}', f'{dataset}_linear_probe', dataset)
    for name, words in runs.items()
  ]


def _measure(study, row):
  plan = study.plan(row.run)
  return Study.measure(study, row) | {
    'expected_batch_size': plan.expected_batch_size,
    'noise_multiplier': plan.noise_multiplier,
    'noise_to_batch': plan.noise_multiplier / plan.expected_batch_size,
  }


def _findings(rows):
  return [above('larger batches help at the same epsilon', rows[len(_WORDS) - 1], rows[0])]


TABLE = Table('Batch', _rows, _findings, _measure)
