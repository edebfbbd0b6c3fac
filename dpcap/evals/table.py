"""Results on the screen."""

from rich.console import Console
from rich.table import Table

from dpcap.evals.subject import Result


def show(results: dict[str, Result]) -> None:
  """Prints one table of all results, and below it what a reader of a figure has to know."""
  table = Table('evaluation', 'metric')
  for column in ('value', '95% interval', 'chance', 'n'):
    table.add_column(column, justify='right')
  for name, result in results.items():
    interval = result.details.get('interval95')
    chance = result.details.get('chance')
    table.add_row(
      name,
      result.metric,
      f'{result.value:.1%}',
      f'{100 * interval[0]:.1f} – {100 * interval[1]:.1f}' if interval else '',
      f'{chance:.1%}' if chance else '',
      f'{result.n:,}',
    )
  console = Console(highlight=False)
  console.print(table)
  for name, result in results.items():
    if result.details.get('note'):
      console.print(f'{name}: {result.details["note"]}', markup=False)
