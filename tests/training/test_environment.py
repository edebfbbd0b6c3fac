"""The description changes with what changes bits, and with nothing else."""

import json

from dpcap.training.environment import describe_environment
from tests import tiny


def test_same_here_and_now_other_where_sums_may_round_differently(monkeypatch):
  config = tiny.get_config()
  here = describe_environment(config)
  assert here == describe_environment(config)
  assert 'jaxlib' in json.loads(here)['versions']
  config.train.log_every = 17
  assert here == describe_environment(config)
  config.mesh.physical_batch = 4
  assert here != describe_environment(config)
  config.mesh.physical_batch = tiny.get_config().mesh.physical_batch
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
  assert here != describe_environment(config)
