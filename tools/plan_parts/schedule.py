"""How long steps take on a machine, and what they need of its hosts."""

import math
import statistics
import time
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from dpcap.training import build
from tools.plan_parts import memory
from tools.plan_parts.machine import Machine

_SECONDS_PER_DAY = 86_400
_TIMED = 3


class Schedule(NamedTuple):
  """A step of average size, and the run.

  Attributes:
    physical_batches: of each row of the mesh.
    images_per_s: that a row is taken to reach.
    compute_s, collectives_s: of one step, one after the other; step_s their sum.
    days: of the whole run.
    images_per_s_per_host: that a host has to read, decode and augment.
  """

  physical_batches: int
  images_per_s: float
  compute_s: float
  collectives_s: float
  step_s: float
  days: float
  images_per_s_per_host: float


def schedule(
  config: ml_collections.ConfigDict,
  machine: Machine,
  images_per_s: float,
  sent: int,
) -> Schedule:
  """The schedule of a run.

  Args:
    config: its config.
    machine: where it is to run.
    images_per_s: of a row of the mesh (mesh.model_parallel devices).
    sent: bytes that each device sends in a step's collectives.
  """
  rows = machine.devices // config.mesh.model_parallel
  examples = config.privacy.expected_batch_size / rows
  batches = math.ceil(examples / config.mesh.physical_batch)
  # A physical batch takes its time however full it is.
  compute = batches * config.mesh.physical_batch / images_per_s
  collectives = sent / (1e9 * machine.link_gb_s)
  step = compute + collectives
  return Schedule(
    physical_batches=batches,
    images_per_s=images_per_s,
    compute_s=compute,
    collectives_s=collectives,
    step_s=step,
    days=step * config.train.steps / _SECONDS_PER_DAY,
    images_per_s_per_host=config.privacy.expected_batch_size / step / machine.hosts,
  )


def assumed_throughput(
  config: ml_collections.ConfigDict, machine: Machine, flops: float, utilization: float
) -> float:
  """Images per second of a row, if it reaches a share of its chips' peak."""
  return 1e12 * machine.chip.peak_tflops * utilization * config.mesh.model_parallel / flops


def measured_throughput(config: ml_collections.ConfigDict, vocab_size: int) -> float:
  """Images per second of this machine's first device, on random examples; takes memory and time."""
  step, state = memory.make_parts(config, vocab_size, abstract=False)
  batches = config.mesh.batches_per_chunk
  lead = (1, batches, config.mesh.physical_batch)
  examples = build.synthetic_examples(config, vocab_size, math.prod(lead))
  examples = {name: x.reshape(lead + x.shape[1:]) for name, x in examples.items()}
  mask, live = np.ones(lead, bool), np.array([batches], np.int32)
  inputs = jax.device_put((examples, mask, live), jax.devices()[0])
  seconds = []
  for _ in range(1 + _TIMED):  # the first one compiles
    accumulator = step.zero(state.params)
    jax.block_until_ready(accumulator)
    start = time.perf_counter()
    jax.block_until_ready(step.accumulate(state, accumulator, *inputs))
    seconds.append(time.perf_counter() - start)
  return batches * config.mesh.physical_batch / statistics.median(seconds[1:])
