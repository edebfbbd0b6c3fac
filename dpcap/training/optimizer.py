"""The optimizer and its schedule (section 5 of Sander et al. 2024, and their code)."""

from typing import Any

import jax
import ml_collections
import optax

PyTree = Any


def make_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """Linear warm-up from 0 to the peak, then a cosine to 0.

  Args:
    config: the section `optimizer`.
    steps: of the run, where the cosine ends if `decay_steps` is None. A decay longer than
      the run is cut off with it, as in the recipe.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.decay_steps or steps,
  )


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW; matrices decay, biases and scales do not, as in the MAE code base."""
  return optax.adamw(
    make_schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
    mask=decaying,
  )


def decaying(params: PyTree) -> PyTree:
  """Which parameters decay: all but biases and scales, which scanned blocks stack to matrices."""
  return jax.tree.map_with_path(
    lambda path, p: p.ndim > 1 and path[-1].key not in ('bias', 'scale'), params
  )
