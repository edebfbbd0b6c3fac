"""What every evaluator is given and what it returns."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from dpcap import data


class Subject(NamedTuple):
  """A model under evaluation.

  Attributes:
    model: the module.
    variables: {'params', 'frozen'} of the checkpoint.
    untrained: the same before training.
    transform: makes evaluation views; holds the tokenizer.
    make_source: a source section of the config -> the source.
    note: is told every source that an evaluator reads, by `batches.each` if by nothing else; it
      decides whether the result may be published.
    workers: processes that load data.
    cache: folder for features; None: they are not kept.
  """

  model: nn.Module
  variables: dict[str, Any]
  untrained: dict[str, Any]
  transform: data.Transform
  make_source: Callable[[Any], data.Source]
  note: Callable[[data.Source], None]
  workers: int
  cache: pathlib.Path | None = None


class Result(NamedTuple):
  """A number and what is needed to trust it; becomes evals/NAME.json.

  Attributes:
    metric: what `value` is.
    value: the number.
    n: how many examples it was measured on.
    details: anything else that is worth writing down, JSON-ready.
  """

  metric: str
  value: float
  n: int
  details: dict[str, Any]
