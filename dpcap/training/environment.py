"""What decides the bits of a step besides config and keys: must be equal for exact replay."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets

import jax
import ml_collections
import numpy as np

import dpcap
from dpcap import data
from dpcap.training import processes

# Environment variables that change what JAX, XLA or the GPU compute.
_SETTINGS = ('JAX_', 'XLA_', 'NVIDIA_TF32', 'LIBTPU')

# Of these, what differs from process to process and from start to start.
_NOT_SETTINGS = ('CACHE', 'JAX_COORDINATOR', 'JAX_PROCESS_ID')


def describe_environment(config: ml_collections.ConfigDict, source: data.Source) -> str:
  """Devices, settings, code, data and batching, as JSON: where equal, steps replay bit for bit.

  Off the CPU, where sums are not taken in a fixed order unless XLA is told so, no two
  descriptions are equal. With many processes it is that of the main one and digests of all.
  """
  own = _describe_process(config, source)
  digest = np.frombuffer(hashlib.sha256(own.encode()).digest(), np.uint8)
  digests = [bytes(d.tolist()).hex() for d in processes.gather(digest.astype(np.int32))]
  return own if len(digests) == 1 else json.dumps([own, digests])


def _describe_process(config: ml_collections.ConfigDict, source: data.Source) -> str:
  devices = jax.devices()
  return json.dumps(
    {
      'devices': [devices[0].platform, devices[0].device_kind, len(devices)],
      'processes': jax.process_count(),
      # Matrix products are split by thread, and by what the processor can do.
      'cpu': [platform.machine(), _cpu_model(), len(os.sched_getaffinity(0))],
      'settings': {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SETTINGS) and not any(part in name for part in _NOT_SETTINGS)
      },
      'partitionable': bool(jax.config.jax_threefry_partitionable),
      'code': _code_hash(),
      'source': source.fingerprint,
      'vocabulary': _file_hash(config.data.vocabulary),
      'nonce': None if devices[0].platform == 'cpu' else secrets.token_hex(8),
      'versions': {
        name: importlib.metadata.version(name)
        for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'pillow', 'tokenizers')
      },
      'mesh': config.mesh.to_dict(),
    },
    sort_keys=True,
  )


def _code_hash() -> str:
  """Of this package: an edit between a crash and the restart may change what is summed."""
  package = pathlib.Path(dpcap.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
  return digest.hexdigest()


def _file_hash(path: str | None) -> str | None:
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if path else None


def _cpu_model() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor()
