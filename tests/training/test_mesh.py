"""Steps on several devices: the same numbers, and no more communication than it takes."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from dpcap.errors import UserError
from dpcap.training.mesh import DATA, MODEL, Layout, make_mesh
from tests import tiny
from tools.plan_parts import memory

MESHES = ('2/1', '4/1', '8/1', '8/2')


@pytest.fixture(scope='module', name='runs')
def _runs(program):
  """What `eight_devices.py` prints, by 'devices/model_parallel'."""
  out, err = program('tests.training.eight_devices').communicate(timeout=300)
  assert out, err
  return json.loads(out)


@pytest.mark.parametrize('mesh', MESHES)
def test_any_mesh_computes_what_one_device_does(runs, mesh):
  one, many = runs['1/1'], runs[mesh]
  assert many['drawn'] == one['drawn'][-len(many['drawn']) :]
  np.testing.assert_allclose(many['losses'], one['losses'][-len(many['losses']) :], rtol=1e-6)
  # Noise of standard deviation 2e-3 goes into every parameter: another draw would show.
  for name in ('params', 'average'):
    np.testing.assert_allclose(many[name], one[name], rtol=0, atol=1e-6)
  assert np.abs(np.subtract(one['params'], one['average'])).max() > 1e-4


@pytest.mark.parametrize('mesh', MESHES)
def test_equal_bits_have_equal_digests_on_any_mesh(runs, mesh):
  assert runs[mesh]['digest'] == runs['1/1']['digest']
  assert len(set(runs[mesh]['digest'])) == 4


def test_a_checkpoint_moves_to_another_number_of_devices(runs):
  # What test_any_mesh_computes_what_one_device_does holds to was half done by eight devices.
  assert len(runs['8/1']['losses']) == 2 and len(runs['4/1']['losses']) == 1


@pytest.mark.parametrize('mesh', ['1/1', '2/1', '4/1', '8/1'])
def test_no_device_waits_for_another_while_a_logical_batch_goes_on(runs, mesh):
  assert runs[mesh]['accumulate'] == {}


def test_devices_of_a_row_meet_inside_the_loop_only_where_they_share_parameters(runs):
  # Also shows that collectives in the loop would be found.
  assert runs['8/2']['in_loops']


@pytest.mark.parametrize('mesh', ['2/1', '4/1', '8/1'])
def test_each_parameter_is_reduced_and_gathered_once_a_step(runs, mesh):
  run = runs[mesh]
  scattered, diagnostics = run['scattered'], 5
  assert scattered > 0
  assert run['update'] == {
    'reduce-scatter': scattered,
    # Of a parameter that is cut, the four numbers that the digest takes of it.
    'all-reduce': run['parameters'] - scattered + diagnostics + scattered,
    'all-gather': scattered,
  }
  # The two moments of Adam.
  assert run['sharded'] == 2 * scattered


def test_devices_that_cannot_be_cut_into_rows_are_refused():
  count = 2 * jax.device_count()
  with pytest.raises(UserError, match=f'mesh.model_parallel is {count}; it must divide'):
    make_mesh(count)


@pytest.fixture(scope='module', name='parts')
def _parts():
  """What `tools.plan` compiles for the step of `eight_devices.py`, on one device."""
  config = tiny.get_config()
  config.privacy.clipping = 'vmap'
  config.mesh.physical_batch, config.mesh.batches_per_chunk = 4, 3
  return memory.measure(config, vocab_size=36)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_memory_as_planned_is_what_xla_takes(runs, parts, devices):
  run = runs[f'{devices}/1']
  mesh = AbstractMesh((devices, 1), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)
  planned = memory.per_device(parts, Layout(mesh))
  update = sum(planned['update'].values())
  assert update == pytest.approx(run['update_bytes'], rel=0.1)
  if run['clipping'] == 'vmap':
    # The compiled half has neither the optimizer's state nor the chunk that is on its way.
    sums = planned['accumulate']
    here = sum(sums.values()) - sums['optimizer state'] - sums['inputs'] // 2
    assert here == pytest.approx(run['accumulate_bytes'], rel=0.1)
