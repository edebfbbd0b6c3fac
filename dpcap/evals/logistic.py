"""Multinomial logistic regression on all examples at once."""

import functools

import jax
import jax.numpy as jnp
import optax

Weights = dict[str, jax.Array]


def zeros(dimension: int, num_classes: int, intercept: bool) -> Weights:
  """Weights to start from: 'w' (dimension, num_classes) and, with an intercept, 'b'."""
  weights = {'w': jnp.zeros((dimension, num_classes))}
  return weights | ({'b': jnp.zeros(num_classes)} if intercept else {})


def logits(weights: Weights, x: jax.Array) -> jax.Array:
  """Scores (n, num_classes) of features (n, dimension)."""
  return x @ weights['w'] + weights.get('b', 0.0)


def predict(weights: Weights, x: jax.Array) -> jax.Array:
  """The class (n,) with the highest score."""
  return jnp.argmax(logits(weights, x), axis=-1)


@functools.partial(jax.jit, static_argnames='iterations')
def minimise(
  weights: Weights, x: jax.Array, y: jax.Array, l2: float, iterations: int, tolerance: float
) -> Weights:
  """Mean cross-entropy + l2 / 2 |w|^2 by L-BFGS, the intercept left free.

  Args:
    weights: where to start.
    x: features (n, dimension).
    y: labels (n,).
    l2: strength.
    iterations: at most.
    tolerance: of the gradient's norm, at which it ends.
  """

  def objective(weights):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), y).mean()
    return loss + 0.5 * l2 * jnp.sum(jnp.square(weights['w']))

  solver = optax.lbfgs(memory_size=10)
  value_and_grad = optax.value_and_grad_from_state(objective)

  def iterate(carry):
    weights, state, i, _ = carry
    value, grad = value_and_grad(weights, state=state)
    updates, state = solver.update(grad, state, weights, value=value, grad=grad, value_fn=objective)
    return optax.apply_updates(weights, updates), state, i + 1, optax.tree.norm(grad)

  def unfinished(carry):
    *_, i, gradient_norm = carry
    return (i < iterations) & (gradient_norm > tolerance)

  start = (weights, solver.init(weights), 0, jnp.inf)
  return jax.lax.while_loop(unfinished, iterate, start)[0]
