"""Plans a run: memory, collectives, time and input of a config on a machine that may not be here.

    python -m tools.plan --config=FILE[:argument] --chip=v5p --devices=256 --hosts=64
        [--images_per_second=X | --measure | --utilization=0.4] [--json] [--config.key=value ...]

Nothing is trained and no data is read. The halves of a training step are compiled from shapes
alone for the device at hand, which is what says how much memory temporaries take; that takes a
minute or two for large models (--config.model.scan_blocks=True: less). An image's time is
given (--images_per_second of one row of the mesh), measured here (--measure), or that of the
operations at a share of the chip's peak (--utilization).

--json prints one line instead of tables: {"machine", "memory": {half: {part: bytes}},
"fits", "collectives": {name: bytes}, "physical_batches", "images_per_s", "flops_per_image",
"compute_s", "collectives_s", "step_s", "days", "images_per_s_per_host"}.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import json
import math

import jax
import ml_collections
from absl import flags
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table

from dpcap import command_line
from dpcap.errors import UserError
from dpcap.training import build
from dpcap.training.mesh import DATA, MODEL, Layout
from tools.plan_parts import memory, schedule
from tools.plan_parts.machine import CHIPS, Machine, make_machine

_CONFIG = command_line.define_config()
_CHIP = flags.DEFINE_string('chip', 'h200', f'One of {", ".join(CHIPS)}.')
_DEVICES = flags.DEFINE_integer('devices', 8, 'Of all hosts together.')
_HOSTS = flags.DEFINE_integer('hosts', 1, 'Each with its share of the devices.')
_NETWORK = flags.DEFINE_float(
  'network_gb_s', None, 'What a device has of the network between hosts, 10^9 bytes per second.'
)
_IMAGES_PER_SECOND = flags.DEFINE_float(
  'images_per_second', None, 'Of one row of the mesh, as measured elsewhere.'
)
_MEASURE = flags.DEFINE_bool('measure', False, "Measure them on this machine's first device.")
_UTILIZATION = flags.DEFINE_float('utilization', 0.4, "Else: share of the chip's peak.")
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', None, "If the config's vocabulary is not here.")
_JSON = flags.DEFINE_bool('json', False, 'One line for programs.')


def main() -> None:
  """Compiles, adds up, prints."""
  check_numbers(_DEVICES, _HOSTS, _NETWORK, _IMAGES_PER_SECOND, _UTILIZATION, _VOCAB_SIZE)
  config = command_line.load_config(_CONFIG)
  machine = make_machine(_CHIP.value, _DEVICES.value, _HOSTS.value, _NETWORK.value)
  layout = _layout(config, machine)
  vocab_size = _VOCAB_SIZE.value or build.make_tokenizer(config).vocab_size
  with Console(stderr=True).status('compiling the step'):
    parts = memory.measure(config, vocab_size)
    images_per_s = _throughput(config, machine, vocab_size, parts.flops)
  collectives = memory.collectives(parts, layout)
  plan = {
    'machine': machine._asdict() | {'chip': machine.chip._asdict()},
    'memory': memory.per_device(parts, layout),
    'collectives': collectives,
    'flops_per_image': parts.flops,
    **schedule.schedule(config, machine, images_per_s, sum(collectives.values()))._asdict(),
  }
  plan['fits'] = _peak(plan) <= 1e9 * machine.chip.memory_gb
  if _JSON.value:
    print(json.dumps(plan))
  else:
    _show(plan, config, machine)


def check_numbers(*holders: flags.FlagHolder) -> None:
  """Refuses infinity, NaN, zero and what is below; None is for flags that were not given.

  Raises:
    UserError: naming the flag.
  """
  for holder in holders:
    if holder.value is not None and not 0 < holder.value < math.inf:
      raise UserError(f'--{holder.name}={holder.value} must be a number above 0')


def _layout(config: ml_collections.ConfigDict, machine: Machine) -> Layout:
  model_parallel = config.mesh.model_parallel
  if (machine.devices // machine.hosts) % model_parallel:
    raise UserError(
      f'mesh.model_parallel is {model_parallel}; it must divide the devices of a host,'
      f' {machine.devices // machine.hosts}'
    )
  shape = (machine.devices // model_parallel, model_parallel)
  return Layout(AbstractMesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto)))


def _throughput(config, machine, vocab_size: int, flops: float) -> float:
  """Images per second of a row of the mesh."""
  if _MEASURE.value:
    return schedule.measured_throughput(config, vocab_size)
  if _IMAGES_PER_SECOND.value is None:
    if not 0 < _UTILIZATION.value <= 1:
      raise UserError(f'--utilization is {_UTILIZATION.value}; it must be above 0, at most 1')
    return schedule.assumed_throughput(config, machine, flops, _UTILIZATION.value)
  if not _IMAGES_PER_SECOND.value > 0:
    raise UserError(f'--images_per_second is {_IMAGES_PER_SECOND.value}; it must be above 0')
  return _IMAGES_PER_SECOND.value


def _peak(plan: dict) -> int:
  return max(sum(parts.values()) for parts in plan['memory'].values())


def _show(plan: dict, config: ml_collections.ConfigDict, machine: Machine) -> None:
  console = Console()
  accumulate, update = plan['memory']['accumulate'], plan['memory']['update']
  table = Table('MB on each device', title=f'Memory, temporaries as on {_here()}')
  for half in ('while a batch is summed', 'while it is released'):
    table.add_column(half, justify='right')
  for part in accumulate:
    both = (f'{x[part] / 1e6:,.1f}' if part in x else '' for x in (accumulate, update))
    table.add_row(part, *both)
  table.add_section()
  table.add_row('together', *(f'{sum(x.values()) / 1e6:,.1f}' for x in (accumulate, update)))
  fits = '' if plan['fits'] else '[bold]does not fit: [/bold]'
  table.add_row(f'{fits}a {machine.name} has', f'{1e3 * machine.chip.memory_gb:,.1f}')
  console.print(table)

  table = Table('sent by each device per step', title='Collectives')
  table.add_column('MB', justify='right')
  table.add_column('s', justify='right')
  for name, size in plan['collectives'].items():
    table.add_row(name, f'{size / 1e6:,.1f}', f'{size / (1e9 * machine.link_gb_s):.4f}')
  console.print(table)

  rows = machine.devices // config.mesh.model_parallel
  source = 'given'
  if _MEASURE.value:
    source = f'measured on {_here()}'
  elif _IMAGES_PER_SECOND.value is None:
    source = f'at {_UTILIZATION.value:.0%} of its peak: --measure on one tells better'
  table = Table('a step', title=f'{machine.devices} {machine.name} on {machine.hosts} hosts')
  table.add_column('', justify='right')
  table.add_row('expected batch size', f'{config.privacy.expected_batch_size:,}')
  table.add_row(
    f'physical batches of {config.mesh.physical_batch} in each of {rows} rows',
    f'{plan["physical_batches"]:,}',
  )
  table.add_row(f'images/s of a row ({source})', f'{plan["images_per_s"]:,.1f}')
  table.add_row('GFLOP per image', f'{plan["flops_per_image"] / 1e9:,.3f}')
  table.add_row('seconds of computing', f'{plan["compute_s"]:,.2f}')
  table.add_row('seconds of collectives', f'{plan["collectives_s"]:,.2f}')
  table.add_row('seconds', f'{plan["step_s"]:,.2f}')
  table.add_section()
  table.add_row(f'days for {config.train.steps:,} steps', f'{plan["days"]:,.2f}')
  table.add_row('images/s that each host has to load', f'{plan["images_per_s_per_host"]:,.0f}')
  console.print(table)


def _here() -> str:
  return jax.devices()[0].device_kind


if __name__ == '__main__':
  command_line.run(main)
