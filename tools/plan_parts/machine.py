"""Machines to plan for."""

from typing import NamedTuple

from dpcap.errors import UserError


class Chip(NamedTuple):
  """What a vendor says of one device.

  Attributes:
    memory_gb: 10^9 bytes.
    peak_tflops: dense, bfloat16.
    link_gb_s: to the devices that it is wired to, one way, 10^9 bytes per second.
  """

  memory_gb: float
  peak_tflops: float
  link_gb_s: float


# Data sheets of NVIDIA (links: half of NVLink's total, which counts both ways) and of Google
# Cloud (interconnect per chip). A TPU v4 or v5p chip is one device to JAX.
CHIPS = {
  'a100': Chip(85.9, 312, 300),
  'h100': Chip(85.9, 989, 450),
  'h200': Chip(151.4, 989, 450),
  'v4': Chip(34.4, 275, 300),
  'v5e': Chip(17.2, 197, 200),
  'v5p': Chip(102.0, 459, 600),
  'v6e': Chip(34.4, 918, 400),
}


class Machine(NamedTuple):
  """Devices of one kind on some hosts.

  Attributes:
    chip: their name and figures.
    devices: of all hosts together.
    hosts: each with its share of the devices.
    link_gb_s: what a device sends through, in a collective of all, 10^9 bytes per second.
  """

  name: str
  chip: Chip
  devices: int
  hosts: int
  link_gb_s: float


def make_machine(name: str, devices: int, hosts: int, network_gb_s: float | None) -> Machine:
  """A machine, checked.

  Args:
    name: a key of CHIPS.
    devices: of all hosts together.
    hosts: how many.
    network_gb_s: what each device has of the network between hosts, 10^9 bytes per second; None:
      hosts are wired as devices are (TPU slices, NVLink domains).

  Raises:
    UserError: naming the flag, its value and what is allowed.
  """
  if name not in CHIPS:
    raise UserError(f'--chip is {name!r}; allowed: {", ".join(CHIPS)}')
  if devices < 1:
    raise UserError(f'--devices is {devices}; it must be at least 1')
  if hosts < 1 or devices % hosts:
    raise UserError(f'--hosts is {hosts}; it must divide --devices, {devices}')
  if network_gb_s is not None and not network_gb_s > 0:
    raise UserError(f'--network_gb_s is {network_gb_s}; it must be above 0')
  chip = CHIPS[name]
  link = chip.link_gb_s if network_gb_s is None or hosts == 1 else network_gb_s
  return Machine(name, chip, devices, hosts, min(link, chip.link_gb_s))
