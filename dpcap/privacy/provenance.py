"""What stands behind a model besides its own run: the weights that it started from.

A run may start from a checkpoint, which may itself have started from another one. Each statement
carries that of its start under 'init', so the last one holds the whole chain. What a model's run
released and what its start had released are both in the model:

| the start was trained on | what follows |
| --- | --- |
| generated data alone | nothing: there is no person in them |
| private data, with a guarantee | for who is in both data sets, epsilons and deltas add up |
| private data without a guarantee, or nobody knows | the model has none; its run's is given it |

That they add up is basic composition, which also holds where the second run sees the first one's
result (Dwork and Roth 2014, theorem 3.16 and appendix B).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpcap.privacy.accounting import ACCOUNTANTS


class Spent(NamedTuple):
  """An (epsilon, delta) guarantee; zeros: nothing private was touched.

  Attributes:
    epsilon: by each accountant; None: it gives no finite bound. At least one does.
    delta: the same for all.
  """

  epsilon: dict[str, float | None]
  delta: float


_NOT_RECORDED = 'data that are not recorded'

NOTHING = Spent({name: 0.0 for name in ACCOUNTANTS}, 0.0)


def foreign_statement(file: str, sha256: str, claims: str | None) -> dict[str, Any]:
  """The statement of weights that another program trained: nothing is vouched for.

  Args:
    file: its name.
    sha256: of the file.
    claims: what its publisher says of it, which nobody has checked here; None: not known.
  """
  text = (
    f'These weights come from elsewhere (file {file}, SHA-256 {sha256}). NO privacy guarantee is'
    ' vouched for: what they were trained on, and how, is not known here.'
  )
  if claims:
    text += f' Claimed, not proven, by who published a file of this name: {claims}.'
  return {
    'private': False,
    'origin': {'file': file, 'sha256': sha256, 'claims': claims},
    'steps': 0,
    'releases': 0,
    'epsilon': {name: None for name in ACCOUNTANTS},
    'delta': None,
    'data': None,
    'init': None,
    'not_covered': ['all that these weights were trained on'],
    'text': text,
  }


def make_start(path: str, parts: Sequence[str], statement: Mapping[str, Any]) -> dict[str, Any]:
  """What a statement records of the weights that its run started from.

  Args:
    path: as the config names them.
    parts: what was taken: 'all', or names of top-level modules.
    statement: theirs.
  """
  # The mark of the keys is of use to that run alone.
  carried = {key: value for key, value in statement.items() if key != 'ledger'}
  return {'path': path, 'parts': list(parts), 'statement': carried}


def describe_start(start: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
  """The entry 'init' of a statement: the start, and what it means beside the run's own guarantee.

  Args:
    start: of `make_start`, or an earlier entry.
    own: the run's statement without it: 'private_given_init', 'data', 'epsilon', 'delta', 'unit'.

  Returns:
    `start` with 'covered' (whether all of it is known to have a guarantee, or to need none),
    'composed' ({'epsilon', 'delta'} of all that was ever trained on private data; None: there is no
    bound) and 'text'.
  """
  behind = spent(start['statement'])
  total = _add(behind, _own(own))
  taken = '' if list(start['parts']) == ['all'] else f' ({", ".join(start["parts"])})'
  text = f'The run started from {start["path"]}{taken}'
  if behind is None:
    missing = '; '.join(dict.fromkeys(_uncovered(start['statement'])))
    text += f'. What stands behind that is not covered: {missing or "weights without a record"}.'
  elif behind == NOTHING:
    sources = ', '.join(dict.fromkeys(map(_source, _chain(start['statement']))))
    text += f', trained on generated data alone ({sources}): nothing private.'
  else:
    text += f', trained on private data with {_guarantee(behind)}.'
    if _own(own) == NOTHING:
      text += " This run's own data are generated, which spends nothing more."
    elif total is not None:
      text += (
        ' For who is in the data of both, guarantees add up (basic composition): together'
        f' {_guarantee(total)}.'
      )
      others = [unit for unit in _units(start['statement']) if unit != own['unit']]
      if others:
        text += (
          f' The unit was another there ({", ".join(others)}): the sum is for who is no more than'
          ' one unit in each.'
        )
    elif _own(own) is not None:
      text += ' For who is in the data of both no bound is known.'
  return {
    'path': start['path'],
    'parts': list(start['parts']),
    'covered': behind is not None,
    'composed': None if total is None else {'epsilon': total.epsilon, 'delta': total.delta},
    'text': text,
    'statement': start['statement'],
  }


def spent(statement: Mapping[str, Any]) -> Spent | None:
  """What a model reveals, with all that it started from; None: without a bound, or not known."""
  try:
    start = statement.get('init')
    return _add(_own(statement), spent(start['statement']) if start else NOTHING)
  # One that another program wrote says nothing here.
  except (KeyError, TypeError, AttributeError):
    return None


def is_generated(statement: Mapping[str, Any]) -> bool:
  """Whether nothing but generated data stands behind a model."""
  return spent(statement) == NOTHING


def _own(statement: Mapping[str, Any]) -> Spent | None:
  if (statement.get('data') or {}).get('generated') is True:
    return NOTHING
  # One of an older version says it of the run alone.
  of_run = 'private_given_init' if 'private_given_init' in statement else 'private'
  if not statement[of_run]:
    return None
  epsilon = {name: statement['epsilon'].get(name) for name in ACCOUNTANTS}
  return _known(Spent(epsilon, statement['delta']))


def _add(a: Spent | None, b: Spent | None) -> Spent | None:
  if a is None or b is None:
    return None
  pairs = {name: (a.epsilon[name], b.epsilon[name]) for name in ACCOUNTANTS}
  epsilon = {name: None if None in pair else sum(pair) for name, pair in pairs.items()}
  return _known(Spent(epsilon, a.delta + b.delta))


def _known(total: Spent) -> Spent | None:
  """None for what bounds nothing, as any epsilon does with a delta of 1."""
  bounds = [value for value in total.epsilon.values() if value is not None]
  sound = all(0 <= value < math.inf for value in bounds) and 0 <= total.delta < 1
  return total if bounds and sound else None


def _guarantee(total: Spent) -> str:
  bounds = ', '.join(
    f'{value:.3f} by {name.upper()}' for name, value in total.epsilon.items() if value is not None
  )
  return f'epsilon = {bounds}, delta = {total.delta:.3g}'


def _chain(statement: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """A statement, that of its start, and so on."""
  while isinstance(statement, Mapping):
    yield statement
    init = statement.get('init')
    statement = init.get('statement') if isinstance(init, Mapping) else None


def _units(statement: Mapping[str, Any]) -> list[str]:
  """What the private runs of a chain protected one of, each once."""
  private = (link for link in _chain(statement) if _own(link) != NOTHING)
  return list(dict.fromkeys(link.get('unit', 'not recorded') for link in private))


def _uncovered(statement: Mapping[str, Any]) -> Iterator[str]:
  """What of a chain has no guarantee, in words."""
  for link in _chain(statement):
    origin = link.get('origin')
    if origin:
      yield f'file {origin["file"]} (SHA-256 {origin["sha256"]}), of unknown training'
    elif spent({**link, 'init': None}) is None:
      yield f'a run on {_source(link)} without a guarantee'


def _source(statement: Mapping[str, Any]) -> str:
  data = statement.get('data')
  return data['source'] if isinstance(data, Mapping) and 'source' in data else _NOT_RECORDED
