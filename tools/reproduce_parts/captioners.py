"""Tables of what captioners alone can do: DP-Cap and the Cap without privacy, against chance."""

from collections.abc import Mapping

from tools.reproduce_parts.scales import STAGE
from tools.reproduce_parts.table import Measured, Row, Table, above_chance

_MODELS = (('Cap, no privacy', 'dpcap:nonprivate'), ('DP-Cap', 'dpcap:base'))


def table_of_captioners(title: str, evaluations: Mapping[str, Mapping[str, str]]) -> Table:
  """A table with two rows for each evaluation.

  Args:
    title: for people.
    evaluations: scale -> entry of `evals` -> the group of its rows.
  """

  def rows(scale: str) -> list[Row]:
    return [
      Row(name, f'{run},{STAGE[scale]}', evaluation, group)
      for evaluation, group in evaluations[scale].items()
      for name, run in _MODELS
    ]

  return Table(title, rows, _findings)


def _findings(rows: list[Measured]):
  return [
    above_chance(f'DP-Cap is above chance at {row["group"]}', row)
    for row in rows
    if row['name'] == 'DP-Cap'
  ]
