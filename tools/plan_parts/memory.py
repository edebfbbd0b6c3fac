"""What a device holds while a logical batch is summed, and while it is released."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpcap import privacy
from dpcap.training import build
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.optimizer import make_optimizer
from dpcap.training.step import Step, TrainState, init_state, make_step

PyTree = Any


class Parts(NamedTuple):
  """Shapes and compiled halves of a config's step on one device.

  Attributes:
    state: as shapes.
    accumulator: as shapes (1, ...).
    chunk: (examples, mask, live) as shapes, one row.
    accumulate, update: memory that XLA takes besides arguments and results, bytes.
    flops: floating-point operations for one example, as XLA counts them.
  """

  state: TrainState
  accumulator: PyTree
  chunk: PyTree
  accumulate: int
  update: int
  flops: float


def measure(config: ml_collections.ConfigDict, vocab_size: int) -> Parts:
  """Compiles both halves of the step for one device, from shapes alone: no array is made.

  It is XLA for the device at hand that says what temporaries take; elsewhere it may differ.
  """
  step, state = make_parts(config, vocab_size)
  accumulator = jax.eval_shape(step.zero, state.params)
  chunk = chunk_shapes(config)
  compiled = step.accumulate.lower(state, accumulator, *chunk).compile()
  key = jax.eval_shape(lambda: jax.random.key(0))
  released = step.update.lower(state, accumulator, key, ()).compile()
  return Parts(
    state=state,
    accumulator=accumulator,
    chunk=chunk,
    accumulate=compiled.memory_analysis().temp_size_in_bytes,
    update=released.memory_analysis().temp_size_in_bytes,
    flops=flops_per_example(config, vocab_size),
  )


def make_parts(
  config: ml_collections.ConfigDict, vocab_size: int, abstract: bool = True
) -> tuple[Step, TrainState]:
  """The config's step on one device, and its state or the state's shapes."""
  model = build.make_model(config, vocab_size)
  layout = Layout(make_mesh(1, jax.devices()[:1]))
  optimizer = make_optimizer(config.optimizer, config.train.steps)
  averaged = config.train.ema_decay is not None
  shapes = build.make_transform(config, tokenizer=None).shapes
  init = functools.partial(init_state, model, optimizer, layout, shapes, 0, averaged)
  state = jax.eval_shape(init) if abstract else init()
  # N and sigma are numbers in the program, not shapes.
  private = config.privacy.epsilon != float('inf')
  plan = privacy.PrivacyPlan(
    dataset_size=2 * config.privacy.expected_batch_size,
    expected_batch_size=config.privacy.expected_batch_size,
    steps=config.train.steps,
    delta=1e-6,
    clip_norm=config.privacy.clip_norm,
    noise_multiplier=1.0 if private else 0.0,
    mechanism=config.privacy.mechanism if private else 'none',
  )
  make = functools.partial(make_step, model, optimizer, plan, layout)
  clip_function = build.make_clip_function(config)
  return make(config.privacy.clipping, clip_function, config.train.ema_decay), state


def chunk_shapes(config: ml_collections.ConfigDict) -> PyTree:
  """(examples, mask, live) that one row of the mesh gets at a time, as shapes."""
  lead = (1, config.mesh.batches_per_chunk, config.mesh.physical_batch)
  shape = jax.ShapeDtypeStruct
  fields = build.make_transform(config, tokenizer=None).shapes
  examples = {name: shape(lead + field.shape, field.dtype) for name, field in fields.items()}
  return examples, shape(lead, np.bool_), shape((1,), np.int32)


def flops_per_example(config: ml_collections.ConfigDict, vocab_size: int) -> float:
  """Of one example: XLA counts the body of a loop once, so blocks must not be scanned."""
  unrolled = config.copy_and_resolve_references()
  if 'scan_blocks' in unrolled.model:
    unrolled.model.scan_blocks = False
  step, state = make_parts(unrolled, vocab_size)
  accumulator = jax.eval_shape(step.zero, state.params)
  lowered = step.accumulate.lower(state, accumulator, *chunk_shapes(config))
  return lowered.cost_analysis()['flops'] / config.mesh.physical_batch


def bytes_of(tree: PyTree, shardings: PyTree = None) -> int:
  """Bytes of shapes, on one device if `shardings` say how they are cut."""
  sizes = lambda shape, x: int(np.prod(shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize
  if shardings is None:
    return sum(sizes(x.shape, x) for x in jax.tree.leaves(tree))
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
  return sum(sizes(sharding.shard_shape(x.shape), x) for x, sharding in pairs)


def per_device(parts: Parts, layout: Layout) -> dict[str, dict[str, int]]:
  """Bytes on each device, by part, in each half of a step.

  Args:
    parts: of `measure`.
    layout: of the mesh planned for; an abstract mesh does.

  Returns:
    {'accumulate': {part: bytes}, 'update': ...}. Temporaries of sums are those of one device that
    has all parameters: with mesh.model_parallel that is more than one takes.
  """
  state = parts.state
  params = bytes_of(state.params, layout.params(state.params))
  optimizer = bytes_of(state.opt_state, layout.shards(state.opt_state))
  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((layout.rows, *x.shape[1:]), x.dtype), parts.accumulator
  )
  resident = {
    'parameters': params + bytes_of(state.frozen),
    'optimizer state': optimizer,
    'running sums': bytes_of(rows, layout.sums_of_rows(rows)),
  }
  return {
    # While one chunk is summed the next is on its way.
    'accumulate': resident | {'inputs': 2 * bytes_of(parts.chunk), 'temporaries': parts.accumulate},
    'update': resident | {'temporaries': _released(parts, layout)},
  }


def _released(parts: Parts, layout: Layout) -> int:
  """Temporaries of the update on a mesh, from those on one device.

  Noise, mean and updates of parameters that are cut along rows are in shards. Then the new
  values are gathered, all of them whole before the old ones are given up.
  """
  params = jax.tree.leaves(parts.state.params)
  everything = sum(bytes_of(x) for x in params)
  cut = sum(bytes_of(x) for x in params if layout.scattered_axis(x.shape) is not None)
  in_shards = parts.update * (1 - cut / everything * (1 - 1 / layout.rows))
  return int(max(in_shards, cut))


def collectives(parts: Parts, layout: Layout) -> dict[str, int]:
  """Bytes that each device sends in the collectives of one logical batch, by ring algorithms.

  What devices of one row tell each other inside a physical batch (mesh.model_parallel) is the
  compiler's choice and not counted.
  """
  rows = layout.rows
  params = jax.tree.leaves(parts.state.params)
  share = lambda x: bytes_of(x, layout.params(x))
  scattered = sum(share(x) for x in params if layout.scattered_axis(x.shape) is not None)
  whole = sum(share(x) for x in params if layout.scattered_axis(x.shape) is None)
  over = lambda size: size * (rows - 1) // rows
  return {
    'reduce-scatter of sums': over(scattered),
    'all-reduce of small sums': 2 * over(whole),
    'all-gather of parameters': over(scattered),
  }
