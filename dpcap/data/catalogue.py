"""Evaluation data sets by name; what is known of each is in datasets/NAME.json.

`source`: the source section's keys; image folders lack their path. `splits`: what train and test are
called there. `clean`: [pattern, replacement] pairs (regular expressions, in order) that make class
names readable. `templates`: prompts for zero-shot classification, the paper's first. `names`: where
readable names come from, if not from the data set.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpcap.errors import UserError

_FOLDER = pathlib.Path(__file__).with_name('datasets')

DATASETS = tuple(sorted(path.stem for path in _FOLDER.glob('*.json')))


class Dataset(NamedTuple):
  """One file of the catalogue; see above."""

  source: dict[str, Any]
  splits: dict[str, str]
  clean: list[list[str]]
  templates: list[str]
  names: str | None = None


def find_dataset(name: str) -> Dataset:
  """The data set of that name.

  Raises:
    UserError: if the catalogue has none.
  """
  if name not in DATASETS:
    raise UserError(f'dataset is {name!r}; allowed: {", ".join(DATASETS)}')
  return Dataset(**json.loads((_FOLDER / f'{name}.json').read_text()))


def readable(dataset: Dataset, class_names: Sequence[str]) -> tuple[str, ...]:
  """Class names as people would write them."""
  names = []
  for name in class_names:
    for pattern, replacement in dataset.clean:
      name = re.sub(pattern, replacement, name)
    names.append(name.strip())
  return tuple(names)
