"""Batches at the same epsilon, 8: the noise of each is what that takes; and a TAN simulation."""

from tools.reproduce_parts.scales import DATASETS
from tools.reproduce_parts.study import Study
from tools.reproduce_parts.table import Row, Table, above

_WORDS = ('batch20k', 'batch82k', 'batch328k', 'batch1m')


def _rows(scale):
  dataset = DATASETS[scale][0]
  rows = [
    Row(f'{word.removeprefix("batch")} of 1m', f'dpcap:{word},calibrated', f'{dataset}_linear_probe')
    for word in _WORDS
  ]
  simulated = 'dpcap:calibrated,simulated'
  return [*rows, Row('simulation of 1m at a 64th', simulated, f'{dataset}_linear_probe')]


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
