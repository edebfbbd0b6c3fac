"""Kept noise: found once, and believed only where it still meets epsilon."""

import json

import pytest

from dpcap import privacy
from dpcap.training import noise_cache

ARGUMENTS = dict(
  epsilon=1.0,
  dataset_size=1000,
  expected_batch_size=100,
  steps=50,
  delta=1e-5,
  clip_norm=1.0,
  mechanism='gaussian',
  sampler='poisson',
  accountant='rdp',
  truncated_batch_size=None,
)


@pytest.fixture
def searched(tmp_path, monkeypatch):
  """The epsilons that were searched for, in a cache of this test."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  searched, calibrate = [], privacy.calibrate

  def counted(**arguments):
    searched.append(arguments['epsilon'])
    return calibrate(**arguments)

  monkeypatch.setattr(privacy, 'calibrate', counted)
  return searched


def test_the_same_is_searched_for_once(searched):
  first, again = (noise_cache.calibrate(**ARGUMENTS) for _ in range(2))
  assert first == again == privacy.PrivacyPlan(
    noise_multiplier=first.noise_multiplier,
    **{k: v for k, v in ARGUMENTS.items() if k != 'epsilon'},
  )
  assert searched == [1.0]


@pytest.mark.parametrize(
  'name, value',
  [
    ('epsilon', 2.0),
    ('dataset_size', 1001),
    ('expected_batch_size', 99),
    ('steps', 51),
    ('delta', 2e-5),
    ('clip_norm', 2.0),
    ('accountant', 'pld'),
  ],
)
def test_any_other_argument_is_another_search(searched, name, value):
  noise_cache.calibrate(**ARGUMENTS)
  other = ARGUMENTS | {name: value}
  assert noise_cache.calibrate(**other) == privacy.calibrate(**other)
  assert len(searched) == 3


@pytest.mark.parametrize(
  'text',
  ['', 'null', '[]', '{"noise_multiplier": 2.9', '{"noise_multiplier": "3"}', '\x00\xff']
  + [json.dumps({'noise_multiplier': x}) for x in (None, 0, -1, 1.0, 30.0, float('nan'), True)],
)
def test_a_file_that_does_not_hold_is_ignored_and_mended(searched, text):
  right = noise_cache.calibrate(**ARGUMENTS)
  (file,) = noise_cache.folder().iterdir()
  file.write_text(text, encoding='latin-1')
  assert noise_cache.calibrate(**ARGUMENTS) == right
  assert noise_cache.calibrate(**ARGUMENTS) == right
  assert searched == [1.0, 1.0]


def test_another_version_of_the_accounting_is_another_search(searched, monkeypatch):
  noise_cache.calibrate(**ARGUMENTS)
  monkeypatch.setattr(noise_cache, '_versions', lambda: ['0.0'])
  noise_cache.calibrate(**ARGUMENTS)
  assert searched == [1.0, 1.0]


def test_a_folder_that_cannot_be_made_costs_a_search(searched, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert noise_cache.calibrate(**ARGUMENTS) == noise_cache.calibrate(**ARGUMENTS)
  assert searched == [1.0, 1.0]


def test_the_run_without_privacy_is_not_kept(searched):
  assert not noise_cache.calibrate(**ARGUMENTS | {'epsilon': float('inf')}).private
  assert not noise_cache.folder().exists()
