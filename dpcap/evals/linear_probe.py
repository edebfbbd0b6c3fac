"""Linear probe: full-batch logistic regression on frozen features.

Features are standardised by the training set. The L2 strength is chosen on a fifth of
the training set that is held out, then the probe is fitted to all of it; the test set is
looked at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpcap.errors import UserError
from dpcap.evals import features as features_lib
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.subject import Result, Subject

L2_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 0.2
_ITERATIONS = 100
_TOLERANCE = 1e-4  # on the gradient's norm


def evaluate(subject: Subject, *, train, test, features: str, batch_size: int) -> Result:
  """Top-1 accuracy of a linear probe, with its 95% interval.

  Args:
    subject: the model.
    train, test: source sections of the config, with the same classes.
    features: one of `features.FEATURES`.
    batch_size: images at a time while features are extracted.

  Raises:
    UserError: if a source has no labels, or the two have different classes.
  """
  sources = {'train': subject.make_source(train), 'test': subject.make_source(test)}
  for name, source in sources.items():
    if not source.class_names:
      raise UserError(f'linear_probe: the {name} source has no labels; give it a label_key')
  classes = sources['train'].class_names
  if sources['test'].class_names != classes:
    different = sorted(set(classes) ^ set(sources['test'].class_names))
    raise UserError(
      'linear_probe: the train and test sources have different classes:'
      f' {", ".join(different[:5]) or "the same names in another order"}'
    )
  x_train, y_train = features_lib.extract(subject, sources['train'], features, batch_size)
  x_test, y_test = features_lib.extract(subject, sources['test'], features, batch_size)
  if not len(y_train) or not len(y_test):
    raise UserError('linear_probe: the train or test source has no usable labelled image')
  probe, l2 = fit(x_train, y_train, len(classes))
  correct = probe(x_test) == y_test
  value, n = float(np.mean(correct)), len(y_test)
  return Result(
    metric='top1',
    value=value,
    n=n,
    details={
      'interval95': wilson_interval(value, n),
      'features': features,
      'dimension': x_train.shape[1],
      'n_train': len(y_train),
      'l2': l2,
      'classes': list(classes),
      'per_class': {
        name: float(np.mean(correct[y_test == i]))
        for i, name in enumerate(classes)
        if np.any(y_test == i)
      },
    },
  )


def fit(x_train: np.ndarray, y_train: np.ndarray, num_classes: int, seed: int = 0):
  """Fits the probe.

  Args:
    x_train: (n, d) features.
    y_train: (n,) labels below num_classes.
    num_classes: number of classes.
    seed: of the split into fitting and held-out parts.

  Returns:
    A function (m, d) -> (m,) predicted labels, and the L2 strength it was fitted with.
  """
  mean, deviation = x_train.mean(0), x_train.std(0)
  deviation = np.where(deviation > 1e-6 * max(deviation.max(), 1e-30), deviation, 1.0)
  standardise = lambda x: jnp.asarray((x - mean) / deviation)
  x, y = standardise(x_train), jnp.asarray(y_train)
  order = np.random.default_rng(seed).permutation(len(y_train))
  held = max(1, int(_HELD_OUT * len(order)))
  held_out, kept = order[:held], order[held:]

  # From much to little regularisation, each fit starting from the one before.
  weights, best, best_accuracy = _zeros(x.shape[1], num_classes), L2_GRID[-1], -1.0
  for l2 in reversed(L2_GRID):
    if not len(kept):
      break
    weights = _minimise(weights, x[kept], y[kept], l2)
    accuracy = float(jnp.mean(_predict(weights, x[held_out]) == y[held_out]))
    if accuracy > best_accuracy:
      best, best_accuracy = l2, accuracy
  weights = _minimise(_zeros(x.shape[1], num_classes), x, y, best)
  return lambda new: np.asarray(_predict(weights, standardise(new))), best


def _zeros(dimension, num_classes):
  return {'w': jnp.zeros((dimension, num_classes)), 'b': jnp.zeros(num_classes)}


def _predict(weights, x):
  return jnp.argmax(x @ weights['w'] + weights['b'], axis=-1)


@jax.jit
def _minimise(weights, x, y, l2):
  """Mean cross-entropy + l2 / 2 |w|^2 by L-BFGS, the bias left free."""

  def objective(weights):
    logits = x @ weights['w'] + weights['b']
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
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
    return (i < _ITERATIONS) & (gradient_norm > _TOLERANCE)

  start = (weights, solver.init(weights), 0, jnp.inf)
  return jax.lax.while_loop(unfinished, iterate, start)[0]
