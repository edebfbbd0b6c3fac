"""Plans of runs: what follows from what, and what is refused. Memory: test_mesh.py."""

import json
import math
import types

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from dpcap import config as config_lib
from dpcap.errors import UserError
from dpcap.training.mesh import DATA, MODEL, Layout
from tests import tiny
from tools import plan
from tools.plan_parts import memory, schedule
from tools.plan_parts.machine import CHIPS, make_machine


def _layout(rows, model_parallel=1):
  axis_types = (AxisType.Auto,) * 2
  return Layout(AbstractMesh((rows, model_parallel), (DATA, MODEL), axis_types=axis_types))


def test_a_step_adds_up():
  config = tiny.get_config()
  config.privacy.expected_batch_size = 1000
  machine = make_machine('v5p', devices=8, hosts=2, network_gb_s=None)
  plan = schedule.schedule(config, machine, images_per_s=50.0, sent=6 * 10**11)
  # 125 images in each of eight rows are 16 physical batches of 8; a link sends 600 GB/s.
  assert plan.physical_batches == 16
  assert plan.compute_s == pytest.approx(16 * 8 / 50)
  assert plan.collectives_s == pytest.approx(1.0)
  assert plan.step_s == pytest.approx(3.56)
  assert plan.days == pytest.approx(3.56 * tiny.STEPS / 86_400)
  assert plan.images_per_s_per_host == pytest.approx(1000 / 3.56 / 2)


def test_devices_that_share_parameters_work_on_one_image():
  config = tiny.get_config()
  config.privacy.expected_batch_size = 1000
  config.mesh.model_parallel = 2
  machine = make_machine('h100', devices=8, hosts=1, network_gb_s=None)
  assert schedule.schedule(config, machine, 50.0, 0).physical_batches == math.ceil(250 / 8)
  per_row = schedule.assumed_throughput(config, machine, flops=1e9, utilization=0.5)
  assert per_row == pytest.approx(989e12 * 0.5 * 2 / 1e9)


def test_the_slowest_link_counts():
  assert make_machine('h100', 16, 2, network_gb_s=50.0).link_gb_s == 50
  assert make_machine('h100', 16, 2, network_gb_s=None).link_gb_s == CHIPS['h100'].link_gb_s
  assert make_machine('h100', 8, 1, network_gb_s=50.0).link_gb_s == CHIPS['h100'].link_gb_s


@pytest.mark.parametrize(
  'flags, message',
  [
    (('b200', 8, 1, None), "--chip is 'b200'; allowed: a100, "),
    (('h100', 0, 1, None), '--devices is 0; it must be at least 1'),
    (('h100', 8, 3, None), '--hosts is 3; it must divide --devices, 8'),
    (('h100', 8, 0, None), '--hosts is 0; it must divide'),
    (('h100', 8, 2, 0.0), '--network_gb_s is 0.0; it must be above 0'),
  ],
)
def test_impossible_machines_are_refused(flags, message):
  with pytest.raises(UserError, match=message):
    make_machine(*flags)


@pytest.mark.parametrize('value', [math.inf, math.nan, 0, -1.0])
def test_numbers_that_are_none_are_refused(value):
  holder = lambda value: types.SimpleNamespace(name='images_per_second', value=value)
  plan.check_numbers(holder(None), holder(0.5))
  with pytest.raises(UserError, match=f'--images_per_second={value} must be a number above 0'):
    plan.check_numbers(holder(1), holder(value))


def test_what_a_device_sends():
  params = {
    'large': jax.ShapeDtypeStruct((64, 33), 'float32'),
    'small': jax.ShapeDtypeStruct((3,), 'float32'),
  }
  state = type('State', (), {'params': params})
  parts = memory.Parts(state, None, None, 0, 0, 0.0)
  assert memory.collectives(parts, _layout(4)) == {
    'reduce-scatter of sums': 64 * 33 * 4 * 3 // 4,
    'all-reduce of small sums': 2 * (3 * 4 * 3 // 4),
    'all-gather of parameters': 64 * 33 * 4 * 3 // 4,
  }
  assert sum(memory.collectives(parts, _layout(1)).values()) == 0


def test_a_model_without_blocks_has_its_operations_too():
  config = tiny.get_config()
  config.model = config_lib.model_config('mlp', widths=(8,))
  config.privacy.clipping = 'vmap'
  # Forward, and backward for the kernels.
  assert memory.flops_per_example(config, 50) > 2 * 2 * 16 * 16 * 3 * 8


def test_the_program_prints_a_plan(program):
  arguments = (
    '--config=tests/tiny.py --chip=v4 --devices=8 --hosts=2 --config.privacy.clipping=vmap'.split()
  )
  out, err = program('tools.plan', *arguments, '--json').communicate(timeout=120)
  plan = json.loads(out)
  assert plan['fits'] and plan['physical_batches'] == 1
  assert plan['memory']['update']['running sums'] > 0
  assert plan['images_per_s'] == pytest.approx(0.4 * 275e12 / plan['flops_per_image'])
