"""What an entry of `evals` is: a function, its own keys, and what it asks of the model.

Each evaluator's file ends with one; `dpcap.evals.EVALUATORS` lists them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dpcap import data
from dpcap.evals.features import FEATURES
from dpcap.evals.subject import Result
from dpcap.key import POSITIVE, Key


class Evaluator(NamedTuple):
  """An evaluator.

  Attributes:
    evaluate: (subject, **options) -> Result.
    keys: its options: name -> Key, or source name -> keys where the option is a source.
    needs: what it calls of the model beside its features; None: no more.
    variants: options whose value decides which others may be set: name -> value -> those.
  """

  evaluate: Callable[..., Result]
  keys: Mapping[str, Any]
  needs: str | None = None
  variants: Mapping[str, Mapping[str, Collection[str]]] = {}


# Keys that several have.
SOURCES = {name: source.KEYS for name, source in data.SOURCES.items()}
PAIR = {'train': SOURCES, 'test': SOURCES}
LAYERS = Key(
  str,
  None,
  "which of the model's features, as its class lists them under LAYERS; None: the first",
  optional=True,
)
CHOICE = {'features': Key(str, 'model', 'what the features are of', FEATURES), 'layers': LAYERS}


def at_a_time(default: int, what: str = 'images') -> Key:
  """How many are computed at a time."""
  return Key(int, default, f'{what} at a time', check=POSITIVE)
