"""The description changes with what changes bits, and with nothing else."""

import json

from dpcap.training import build, environment
from tests import tiny


def describe(config):
  return environment.describe_environment(config, build.make_training_source(config))


def test_same_here_and_now_other_where_sums_may_round_differently(monkeypatch):
  config = tiny.get_config()
  here = describe(config)
  assert here == describe(config)
  assert 'jaxlib' in json.loads(here)['versions']
  config.train.log_every = 17
  assert here == describe(config)
  config.mesh.physical_batch = 4
  assert here != describe(config)
  config.mesh.physical_batch = tiny.get_config().mesh.physical_batch
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
  assert here != describe(config)
  monkeypatch.delenv('XLA_FLAGS')
  for name in ('JAX_THREEFRY_PARTITIONABLE', 'JAX_DEFAULT_MATMUL_PRECISION'):
    with monkeypatch.context() as patch:
      patch.setenv(name, '1')
      assert here != describe(config)
  config.data.source.size = 401
  assert here != describe(config)
  config.data.source.size = 400
  monkeypatch.setattr(environment, '_code_hash', lambda: 'edited')
  assert here != describe(config)
