"""Steps on meshes of 1 to 8 devices of one process; prints what came out as JSON.

A program, for devices are counted when JAX starts; test_mesh.py runs it.
"""

import collections
import json
import os
import pathlib
import re
import sys
import tempfile

os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=8'

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from dpcap import data, models, privacy  # noqa: E402
from dpcap.training.checkpoints import Checkpoints  # noqa: E402
from dpcap.training.mesh import Layout, make_mesh  # noqa: E402
from dpcap.training.step import init_state, make_step  # noqa: E402
from tests import tiny  # noqa: E402

STEPS, PHYSICAL, BATCHES = 2, 4, 3
# (devices, those of them that share parameters, clipping); vmap is the faster one to compile.
RUNS = [
  (1, 1, 'vmap'),
  (2, 1, 'vmap'),
  (8, 1, 'bookkeeping'),
  (8, 2, 'bookkeeping'),
  (4, 1, 'vmap'),  # goes on from the checkpoint that 8 devices wrote after the first step
]
WRITER, READER = (8, 1), (4, 1)
COLLECTIVES = ('all-reduce', 'reduce-scatter', 'all-gather', 'collective-permute', 'all-to-all')


def collectives(text: str) -> dict[str, int]:
  """Kind of collective -> how many operands they have together, in a compiled program."""
  counts = collections.Counter()
  for kind, operands in re.findall(rf'\b({"|".join(COLLECTIVES)})(?:-start)?\(([^)]*)\)', text):
    counts[kind] += operands.count('%')
  return dict(counts)


def memory(compiled) -> int:
  """Bytes that XLA says one device needs."""
  of = compiled.memory_analysis()
  results = of.output_size_in_bytes - of.alias_size_in_bytes
  return of.argument_size_in_bytes + results + of.temp_size_in_bytes


def loops(text: str) -> str:
  """The computations of a compiled program that are, or are called in, a loop's body."""
  computations = dict(re.findall(r'^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}', text, re.M | re.S))
  seen, todo = set(), re.findall(r'body=%?([\w.-]+)', text)
  while todo:
    name = todo.pop()
    if name not in seen:
      seen.add(name)
      called = r'(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.-]+)'
      todo += re.findall(called, computations[name])
  return '\n'.join(computations[name] for name in seen)


def run(devices: int, model_parallel: int, clipping: str, folder: pathlib.Path) -> dict:
  """Steps on the first devices: parameters, sums, losses, and what they communicate."""
  layout = Layout(make_mesh(model_parallel, jax.devices()[:devices]))
  config = tiny.get_config()
  tokenizer = data.make_tokenizer('wordpiece', config.data.vocabulary)
  model = models.make_model(
    image_size=16, vocab_size=tokenizer.vocab_size, **config.model.to_dict()
  )
  plan = privacy.PrivacyPlan(
    dataset_size=400,
    expected_batch_size=50,
    steps=STEPS,
    delta=1e-3,
    clip_norm=0.1,
    noise_multiplier=1.0,
  )
  optimizer = optax.adamw(1e-3)
  keys = privacy.Keys.from_seed(3)
  batches = data.LogicalBatches(
    source=data.Scenes(image_size=16, split='train', size=400, label='color'),
    transform=data.Transform(16, 8, tokenizer),
    draw=plan.make_sampler(keys.sampling).draw,
    augmentation_rng=lambda step, index: np.random.default_rng([step, index]),
    steps=STEPS,
    expected_batch_size=50,
    physical_batch=PHYSICAL,
    batches_per_chunk=BATCHES,
    rows=layout.rows,
    local_rows=layout.local_rows,
  )
  shapes = batches.transform.shapes
  state = init_state(model, optimizer, layout, shapes, seed=0, averaged=True)
  step = make_step(model, optimizer, plan, layout, clipping, ema_decay=0.5)
  key = jax.device_put(keys.noise_key(), layout.whole())
  checkpoints, first = Checkpoints(folder), 0
  if (devices, model_parallel) == READER:
    first = checkpoints.latest_step()
    state = checkpoints.restore(first, state)
  out = {'clipping': clipping, 'losses': [], 'drawn': []}
  accumulate = update = None
  for i in range(first, STEPS):
    accumulator, drawn = step.zero(state.params), 0
    for slot in range(batches.slots):
      for chunk in batches[i * batches.slots + slot]:
        inputs = jax.device_put((chunk.examples, chunk.mask, chunk.live), layout.by_row())
        if accumulate is None:
          accumulate = step.accumulate.lower(state, accumulator, *inputs).compile()
          text = accumulate.as_text()
          out['accumulate'], out['in_loops'] = collectives(text), collectives(loops(text))
          out['accumulate_bytes'] = memory(accumulate)
        accumulator = accumulate(state, accumulator, *inputs)
        drawn += chunk.drawn
    if update is None:
      update = step.update.lower(state, accumulator, key, ()).compile()
      out['update'] = collectives(update.as_text())
      out['update_bytes'] = memory(update)
      out['sharded'] = sum(not x.is_fully_replicated for x in jax.tree.leaves(state.opt_state))
      shapes = [x.shape for x in jax.tree.leaves(state.params)]
      out['parameters'] = len(shapes)
      out['scattered'] = sum(layout.scattered_axis(shape) is not None for shape in shapes)
    state, _, diagnostics, _ = update(state, accumulator, key, ())
    out['losses'].append(float(diagnostics['loss']))
    out['drawn'].append(drawn)
    if (devices, model_parallel, i) == (*WRITER, 0):
      checkpoints.save(state, {})
  checkpoints.close()
  for name, tree in (('params', state.params), ('average', state.variables['params'])):
    out[name] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).tolist()
  # Of nothing but noise: any order of summation gives the same bits.
  out['digest'] = update(state, step.zero(state.params), key, ())[-1].tolist()
  return out


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as folder:
    runs = {f'{d}/{m}': run(d, m, clipping, pathlib.Path(folder)) for d, m, clipping in RUNS}
  json.dump(runs, sys.stdout)
