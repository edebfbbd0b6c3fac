"""An entry of a config: its type, its default and what is allowed.

Whatever has keys of its own says them in its own file: a model or a source in its class, as a dict
KEYS, an evaluator in its EVALUATOR. dpcap/schema.py collects them, and has those of the sections.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
  """One entry of a config.

  Attributes:
    kind: its type; an int does for a float.
    default: None needs `optional`.
    help: what it means, with units.
    allowed: the values it may take, if they can be listed.
    check: what it must fulfil, as (predicate, its description).
    optional: whether None is allowed.
    fixed: whether a run that resumes must keep it, because it bears on what is computed.
  """

  kind: type
  default: Any
  help: str
  allowed: tuple[str, ...] | None = None
  check: tuple[Callable[[Any], bool], str] | None = None
  optional: bool = False
  fixed: bool = True


# Checks that many keys share.
GIVEN = (bool, 'given')
POSITIVE = (lambda x: x > 0, 'above 0')
NOT_NEGATIVE = (lambda x: x >= 0, '0 or more')
FRACTION = (lambda x: 0 <= x < 1, 'from 0 to below 1')
COUNTS = (
  lambda x: bool(x) and all(type(n) is int and n > 0 for n in x),
  'one or more whole numbers above 0',
)
