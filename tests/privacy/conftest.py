"""Fresh random inputs in every run; the seed is printed with a failure."""

import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
  """A generator from fresh entropy; to replay a failure, put the printed seed here."""
  seed = secrets.randbits(64)
  print(f'rng seed: {seed}')
  return np.random.default_rng(seed)
