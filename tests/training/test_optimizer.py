"""The recipe's schedule and AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dpcap
from dpcap.training.optimizer import make_optimizer, make_schedule


def test_main_run_warms_up_over_2000_and_is_cut_off_its_cosine_at_5708():
  config = dpcap.get_config()
  schedule = make_schedule(config.optimizer, config.train.steps)
  peak = 1e-7 * 1_310_720 / 256
  assert schedule(0) == 0
  np.testing.assert_allclose(schedule(1000), peak / 2, rtol=1e-6)
  np.testing.assert_allclose(schedule(2000), peak, rtol=1e-6)
  for step in (3000, 5707, 9999):
    cosine = 0.5 * peak * (1 + np.cos(np.pi * (step - 2000) / 8000))
    np.testing.assert_allclose(schedule(step), cosine, rtol=1e-4, atol=1e-11)


def test_cosine_ends_with_the_run_where_no_decay_is_given():
  config = dpcap.get_config()
  config.optimizer.decay_steps = None
  assert make_schedule(config.optimizer, 5708)(5708) == pytest.approx(0, abs=1e-12)


def test_adamw_equals_a_direct_version_and_decays_matrices_only():
  config = dpcap.get_config().optimizer
  config.warmup_steps, config.decay_steps = 1, 10
  rng = np.random.default_rng()
  params = {
    'w': rng.normal(size=(3, 2)),
    'b': rng.normal(size=2),
    'scale': rng.normal(size=(4, 2)),  # of four scanned blocks
  }
  optimizer = make_optimizer(config, 10)
  schedule = make_schedule(config, 10)
  state, x = optimizer.init(jax.tree.map(jnp.float32, params)), dict(params)
  moments = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in params.items()}
  for t in range(1, 5):
    grads = {k: rng.normal(size=v.shape) for k, v in params.items()}
    updates, state = optimizer.update(
      jax.tree.map(jnp.float32, grads), state, jax.tree.map(jnp.float32, x)
    )
    for k, g in grads.items():
      m, v = moments[k]
      m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
      moments[k] = m, v
      step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
      step += (0.005 * x[k]) if k == 'w' else 0
      expected = -float(schedule(t - 1)) * step
      np.testing.assert_allclose(updates[k], expected, rtol=1e-4, atol=1e-9)
      x[k] = x[k] + expected
