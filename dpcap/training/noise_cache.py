"""Calibrated noise multipliers, kept in the user's cache folder: a run finds its noise once.

What is kept follows from the config and N alone. It is not trusted: that it meets epsilon, and that
clearly less noise would not, is computed anew, which takes far less time than to find it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib

from dpcap import privacy
from dpcap.training.workdir import write_whole

# With less noise by this share a kept multiplier must no longer meet epsilon. A faster PLD
# may find a little more noise necessary than the one that it was calibrated by.
_CLEARLY = 0.02


def calibrate(**arguments) -> privacy.PrivacyPlan:
  """`privacy.calibrate(**arguments)`, from the cache if the same was asked before.

  A file that is damaged, or of another version of the accounting, is ignored; so is a folder
  that cannot be written.

  Raises:
    ValueError: as privacy.calibrate.
  """
  path = folder() / f'{_name(arguments)}.json'
  plan = _kept(path, arguments)
  if plan is None:
    plan = privacy.calibrate(**arguments)
    if plan.private:
      with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({'noise_multiplier': plan.noise_multiplier}) + '\n')
  return plan


def folder() -> pathlib.Path:
  """Where they are kept."""
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(cache) / 'dpcap' / 'noise'


def _kept(path, arguments):
  """The plan of a file, None if there is none that holds."""
  rest = {k: v for k, v in arguments.items() if k != 'epsilon'}
  epsilon = arguments['epsilon']
  try:
    sigma = json.loads(path.read_text())['noise_multiplier']
    plan = privacy.PrivacyPlan(noise_multiplier=sigma, **rest)
    if not (plan.private and math.isfinite(epsilon) and plan.is_within(epsilon)):
      return None
    if sigma <= privacy.calibration.SMALLEST_NOISE_MULTIPLIER[plan.accountant]:
      return plan
    less = dataclasses.replace(plan, noise_multiplier=(1 - _CLEARLY) * sigma)
    return None if less.is_within(epsilon) else plan
  except (OSError, ValueError, TypeError, KeyError):
    return None


def _name(arguments):
  return hashlib.sha256(json.dumps([arguments, _versions()], sort_keys=True).encode()).hexdigest()


@functools.cache
def _versions():
  modules = privacy.accounting, privacy.calibration, privacy.plan
  return [
    *(importlib.metadata.version(name) for name in ('dp-accounting', 'numpy', 'scipy')),
    *(hashlib.sha256(pathlib.Path(m.__file__).read_bytes()).hexdigest() for m in modules),
  ]
