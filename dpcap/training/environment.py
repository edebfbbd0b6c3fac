"""What decides the bits of a step besides config and keys: must be equal for exact replay."""

import importlib.metadata
import json
import os
import pathlib
import platform

import jax
import ml_collections


def describe_environment(config: ml_collections.ConfigDict) -> str:
  """Devices, libraries and batching, as JSON. Runs with equal ones replay bit for bit."""
  devices = jax.devices()
  return json.dumps(
    {
      'devices': [devices[0].platform, devices[0].device_kind, len(devices)],
      'processes': jax.process_count(),
      # Matrix products are split by thread, and by what the processor can do.
      'cpu': [platform.machine(), _cpu_model(), len(os.sched_getaffinity(0))],
      'flags': os.environ.get('XLA_FLAGS', ''),
      'versions': {
        name: importlib.metadata.version(name)
        for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'pillow', 'tokenizers')
      },
      'mesh': config.mesh.to_dict(),
    },
    sort_keys=True,
  )


def _cpu_model() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor()
