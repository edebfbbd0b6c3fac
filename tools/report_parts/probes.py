"""Probes against each other: which may be compared, and what their intervals say."""

import json
from collections.abc import Sequence
from typing import Any

from tools.report_parts.run import Run


def comparable(run: Run) -> list[list[dict[str, Any]]]:
  """The probes of a run in groups with the same train and test sources, and layers of a model.

  What is not of a model (pixels) is in each. The model's own features come first in a group, then
  the best.
  """
  records = [record for record in run.evals.values() if is_probe(record)]
  sources = lambda record: json.dumps([record['options']['train'], record['options']['test']])
  of_models = [record for record in records if record['features'] in ('model', 'untrained')]
  groups = dict.fromkeys((sources(record), record.get('layers')) for record in of_models)
  compared = {source for source, _ in groups}
  groups |= {(sources(record), None): None for record in records if sources(record) not in compared}
  order = lambda record: (not is_own(record), -record['value'])
  return [
    sorted(
      (
        record
        for record in records
        if sources(record) == source
        and (record not in of_models or record.get('layers') == layers)
      ),
      key=order,
    )
    for source, layers in groups
  ]


def is_probe(record: dict[str, Any]) -> bool:
  """Whether it is a result of linear_probe, which knows which features it probed."""
  return 'features' in record and record.get('evaluator', 'linear_probe') == 'linear_probe'


def is_own(record: dict[str, Any]) -> bool:
  """Whether the trained model was judged, not features that it has no part in."""
  return record.get('features', 'model') == 'model'


def features(record: dict[str, Any]) -> str:
  """What was probed: of which model, and which of its layers, where the result tells."""
  return ', '.join(filter(None, [record['features'], record.get('layers')])).replace('_', ' ')


def title(record: dict[str, Any]) -> str:
  """The name for people."""
  return record['name'].replace('_', ' ')


def verdict(group: Sequence[dict[str, Any]]) -> str:
  """What the intervals say of the model's features against all others, in a sentence."""
  own, others = group[0], [record for record in group if not is_own(record)]
  name = title(own)[0].upper() + title(own)[1:]
  if not is_own(own):
    return f"{name}: the model's features were not probed on the same train and test images."
  if not others:
    return f'{name}: nothing else was probed on the same train and test images.'
  low, high = own['interval95']
  best = max(others, key=lambda other: other['interval95'][1])
  if low > best['interval95'][1]:
    return (
      f'{name} is above every other probe: its interval starts at {low:.1%}, the highest of'
      f' the others ({title(best)}) ends at {best["interval95"][1]:.1%}.'
    )
  reasons = []
  for other in others:
    if other['interval95'][0] > high:
      reasons.append(f'{title(other)} is better ({other["value"]:.1%})')
    elif other['interval95'][1] >= low:
      reasons.append(f'{title(other)} cannot be told apart ({other["value"]:.1%})')
  return (
    f'{name} ({own["value"]:.1%}) is not above every other probe, going by the 95%'
    f' intervals: {"; ".join(reasons)}.'
  )
