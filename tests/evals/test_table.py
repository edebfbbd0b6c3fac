"""The table of results says what the results hold."""

from dpcap import evals
from dpcap.evals import table


def test_a_row_for_each_result(capsys):
  table.show(
    {
      'probe': evals.Result('top1', 0.9123, 4321, {'interval95': (0.9012, 0.9234), 'chance': 0.25}),
      'captions': evals.Result('exact_match', 0.5, 2, {}),
    }
  )
  rows = [line.split('│')[1:-1] for line in capsys.readouterr().out.splitlines() if '│' in line]
  assert [[cell.strip() for cell in row] for row in rows] == [
    ['probe', 'top1', '91.2%', '90.1 – 92.3', '25.0%', '4,321'],
    ['captions', 'exact_match', '50.0%', '', '', '2'],
  ]


def test_notes_stand_below(capsys):
  note = 'data.text_length [40] cuts 3 captions ' + 'and says so at length ' * 6
  noted, other = ({'note': note}, {})
  table.show({'aro': evals.Result('accuracy', 0.5, 2, noted), 'b': evals.Result('x', 1, 1, other)})
  below = capsys.readouterr().out.rpartition('┘')[2]
  assert ' '.join(below.split()) == f'aro: {note}'.strip()
