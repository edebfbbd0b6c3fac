"""The optimizer and its schedule.

AdamW on a cosine is DP-Cap's (section 5 of Sander et al. 2024, and their code), SGD at a constant
rate TAN's (Sander et al. 2023, and their code).
"""

from typing import Any

import jax
import ml_collections
import optax

PyTree = Any

# The values of `name` and `schedule`, and the keys that go with one of them alone.
OPTIMIZERS = {'adamw': ('b1', 'b2'), 'sgd': ('momentum',)}
SCHEDULES = {'cosine': ('decay_steps',), 'constant': ()}


def make_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Linear warm-up from 0 to the peak, then a cosine to 0 or the peak for ever.

  Args:
    config: the section `optimizer`.
    steps: of the run, where the cosine ends if `decay_steps` is None. A decay longer than
      the run is cut off with it, as in the recipe.
  """
  if config.schedule == 'constant':
    peak = optax.constant_schedule(config.learning_rate)
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, peak], [config.warmup_steps])
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.decay_steps or steps,
  )


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW, or SGD with momentum; matrices decay, biases and scales do not, as in the MAE code base.

  The decay of SGD is a part of the gradient, and so of the momentum; AdamW's is beside it.
  """
  schedule = make_schedule(config, steps)
  if config.name == 'sgd':
    decay = optax.add_decayed_weights(config.weight_decay or 0.0, decaying)
    return optax.chain(decay, optax.sgd(schedule, momentum=config.momentum or None))
  return optax.adamw(
    schedule,
    b1=0.9 if config.b1 is None else config.b1,
    b2=0.95 if config.b2 is None else config.b2,
    weight_decay=0.005 if config.weight_decay is None else config.weight_decay,
    mask=decaying,
  )


def decaying(params: PyTree) -> PyTree:
  """Which parameters decay: all but biases and scales, which scanned blocks stack to matrices."""
  return jax.tree.map_with_path(
    lambda path, p: p.ndim > 1 and path[-1].key not in ('bias', 'scale'), params
  )
