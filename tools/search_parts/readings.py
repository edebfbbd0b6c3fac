"""Losses read off along a run's own diagnostics."""

import math
import pathlib

import numpy as np

from dpcap.errors import UserError
from dpcap.training.metrics import DIAGNOSTICS, read_jsonl
from tools.search_parts.law import Reading

# How much longer a run is at the end of a stretch than at its start.
_STRETCH = 1.25

# The loss before falls for other reasons than learning from images.
_FIRST_STEP = 10


def read(workdir: pathlib.Path, size: str, ratio: float, warmup: int) -> list[Reading]:
  """The losses of a run, each the mean over a stretch of steps that grows with them.

  Those of the warm-up are left out. The last stretch ends with the last step.

  Raises:
    UserError: if the run has no losses.
  """
  path = workdir / DIAGNOSTICS
  lines = [line for line in read_jsonl(path) if line.get('loss') is not None]
  if not lines:
    raise UserError(f'{path}: holds no losses, the run learnt nothing or its gradients are NaN')
  last = lines[-1]['step']
  readings = []
  end = float(last)
  while (start := end / _STRETCH) >= max(warmup, _FIRST_STEP):
    own = [line for line in lines if start < line['step'] <= end]
    if len(own) > 1:
      drawn = np.array([line['examples'] for line in own])
      losses = np.array([line['loss'] for line in own])
      if drawn.sum():
        middle = math.exp(np.mean(np.log([line['step'] for line in own])))
        readings.append(Reading(size, ratio, middle, float(losses @ drawn / drawn.sum())))
    end = start
  if not readings:
    raise UserError(
      f'{path}: the run ends with step {last}, before its loss can be read; it takes more than'
      f' {math.ceil(_STRETCH * max(warmup, _FIRST_STEP))} steps (optimizer.warmup_steps is'
      f' {warmup})'
    )
  return readings[::-1]
