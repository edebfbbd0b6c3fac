"""The recipes' schedules, AdamW and SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dpcap
from dpcap import config as config_lib
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


def tan():
  """What TAN trains with: SGD at rate 4, without momentum or decay."""
  config = config_lib.base_config().optimizer
  config.name, config.schedule = 'sgd', 'constant'
  config.learning_rate = 4.0
  return config


def test_a_constant_schedule_is_at_its_peak_from_the_first_step_or_after_the_warmup():
  config = tan()
  schedule = make_schedule(config, 2500)
  assert [float(schedule(step)) for step in (0, 1, 2499, 10**6)] == [4.0] * 4
  config.warmup_steps = 4
  schedule = make_schedule(config, 2500)
  assert [float(schedule(step)) for step in (0, 1, 2, 3, 4, 2499)] == [0, 1, 2, 3, 4, 4]


def steps(config, params, all_grads):
  """The updates of each step."""
  optimizer = make_optimizer(config, len(all_grads))
  state = optimizer.init(params)
  for grads in all_grads:
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield updates, params


def test_sgd_of_tan_takes_the_rate_times_the_gradient_and_keeps_no_state_of_its_size():
  config = tan()
  params = {'kernel': jnp.full((2, 3), 5.0), 'bias': jnp.full(3, 7.0)}
  grads = jax.tree.map(jnp.ones_like, params)
  for updates, _ in steps(config, params, [grads, grads]):
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, -4 * np.ones_like(u)), updates)
  state = make_optimizer(config, 2).init(params)
  assert all(not leaf.shape for leaf in jax.tree.leaves(state))


def test_sgd_with_momentum_and_decay_equals_a_direct_version():
  config = tan()
  config.learning_rate, config.momentum, config.weight_decay = 0.1, 0.9, 0.01
  rng = np.random.default_rng()
  x = {'kernel': rng.normal(size=(2, 3)), 'bias': rng.normal(size=3)}
  all_grads = [{k: rng.normal(size=v.shape) for k, v in x.items()} for _ in range(3)]
  velocity = {k: np.zeros_like(v) for k, v in x.items()}
  run = steps(config, jax.tree.map(jnp.float32, x), jax.tree.map(jnp.float32, all_grads))
  for grads, (_, params) in zip(all_grads, run, strict=True):
    for k, g in grads.items():
      g = g + (0.01 * x[k] if k == 'kernel' else 0)
      velocity[k] = 0.9 * velocity[k] + g
      x[k] = x[k] - 0.1 * velocity[k]
      np.testing.assert_allclose(params[k], x[k], rtol=1e-4, atol=1e-6)


def test_adamw_has_betas_and_decay_of_the_recipe_where_none_are_given():
  config = config_lib.base_config().optimizer
  given = config_lib.base_config().optimizer
  given.b1, given.b2, given.weight_decay = 0.9, 0.95, 0.005
  params = {'kernel': jnp.ones((2, 2))}
  grads = [{'kernel': jnp.array([[1.0, -2.0], [3.0, 0.1]]) * i} for i in (1, -1, 2)]
  for (a, _), (b, _) in zip(steps(config, params, grads), steps(given, params, grads), strict=True):
    np.testing.assert_array_equal(a['kernel'], b['kernel'])
