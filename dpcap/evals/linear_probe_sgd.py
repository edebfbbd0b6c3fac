"""Linear probe by SGD or LARS: the protocol of MAE (He et al. 2022, appendix A.1) and of the paper.

A linear head behind a batch norm without affine parameters is trained on the features of augmented
views, which the frozen encoder computes anew in every epoch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpcap import data
from dpcap.evals import batches as batches_lib
from dpcap.evals import features as features_lib
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import LAYERS, PAIR, Evaluator, at_a_time
from dpcap.evals.subject import Result, Subject
from dpcap.key import NOT_NEGATIVE, POSITIVE, Key

OPTIMIZERS = ('lars', 'sgd')
_CROP_SCALE = (0.08, 1.0)
_HELD_OUT = 0.2
_MOMENTUM = 0.9
_NORM_MOMENTUM = 0.1  # of the running mean and variance
_NORM_EPSILON = 1e-6
_INIT_DEVIATION = 0.01


class Heads(NamedTuple):
  """H heads that are trained side by side, with one normalisation of their input.

  Attributes:
    weights: 'w' (H, dimension, classes) and 'b' (H, classes).
    state: of the optimizers, with a leading axis H.
    mean, variance: (dimension,) running estimates.
  """

  weights: dict[str, jax.Array]
  state: Any
  mean: jax.Array
  variance: jax.Array


def evaluate(
  subject: Subject,
  *,
  train,
  test,
  layers: str | None = None,
  optimizer: str,
  epochs: int,
  warmup_epochs: int,
  base_learning_rates: Sequence[float],
  probe_batch_size: int,
  augment: bool,
  batch_size: int,
) -> Result:
  """Top-1 accuracy of a linear probe, with its 95% interval.

  The learning rate is base_learning_rate * probe_batch_size / 256, after a linear warmup a cosine to
  zero. Of several base rates the best on a fifth of the training images, held out, is taken to train
  on all of them; the test set is looked at once.

  Args:
    subject: the model.
    train, test: source sections of the config, with the same classes.
    layers: of the model, see `features.choose`; 'all_blocks' is what ViP probes.
    optimizer: one of OPTIMIZERS, momentum 0.9, no weight decay.
    epochs: passes over the training images.
    warmup_epochs: of these.
    base_learning_rates: to choose from.
    probe_batch_size: images of a step, or all of them where there are fewer.
    augment: random crops (8 to 100% of the area) and flips; otherwise every epoch has the same views.
    batch_size: images at a time in the encoder.

  Raises:
    UserError: if the sources do not belong together.
  """
  choice = features_lib.choose('linear_probe_sgd', subject.model, 'model', layers)
  source, test_source = features_lib.make_pair(subject, 'linear_probe_sgd', train, test)
  pair = features_lib.checked_pair(
    'linear_probe_sgd',
    *(features_lib.extract(subject, s, choice, batch_size) for s in (source, test_source)),
    source.class_names,
  )
  settings = dict(
    optimizer=optimizer,
    epochs=epochs,
    warmup_epochs=warmup_epochs,
    probe_batch_size=probe_batch_size,
    batch_size=batch_size,
  )

  def fit(places, rates):
    embed = features_lib.make_embed(subject, choice)
    views = functools.partial(_augmented, embed) if augment else _kept
    return train_heads(subject, source, pair, places, rates, views, **settings)

  rate = base_learning_rates[0]
  if len(base_learning_rates) > 1:
    order = np.random.default_rng(0).permutation(len(pair.train.labels))
    held = max(1, int(_HELD_OUT * len(order)))
    predicted = predict(fit(order[held:], base_learning_rates), pair.train.features[order[:held]])
    right = np.mean(predicted == pair.train.labels[order[:held]], axis=1)
    rate = base_learning_rates[int(np.argmax(right))]
  heads = fit(np.arange(len(pair.train.labels)), [rate])
  return top1(
    predict(heads, pair.test.features)[0],
    pair.test.labels,
    pair.classes,
    **choice._asdict(),
    base_learning_rate=rate,
    n_train=len(pair.train.labels),
  )


def train_heads(
  subject: Subject,
  source: data.Source,
  pair: features_lib.Pair,
  places: np.ndarray,
  rates: Sequence[float],
  views,
  *,
  optimizer: str,
  epochs: int,
  warmup_epochs: int,
  probe_batch_size: int,
  batch_size: int,
) -> Heads:
  """Trains a head for each base learning rate, all on the same views.

  Args:
    places: of the training images in pair.train.
    views: yields the features and labels of each step's views.
    others: see `evaluate`.
  """
  size = min(probe_batch_size, len(places))
  per_epoch = len(places) // size
  scale, schedule = _schedules(rates, size, per_epoch, epochs, warmup_epochs)
  step = make_step(optimizer, schedule)
  heads = start_heads(pair.train.features.shape[1], len(pair.classes), scale, optimizer, schedule)
  for x, y in views(subject, source, pair.train, places, size, epochs, batch_size):
    heads = step(heads, scale, x, y)
  return heads


def _schedules(rates, size, per_epoch, epochs, warmup_epochs):
  """Peak learning rates (H,), and the share of the peak by step."""
  warmup = per_epoch * min(warmup_epochs, epochs)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, warmup, max(per_epoch * epochs, warmup + 1)
  )
  return jnp.asarray(rates, jnp.float32) * size / 256, schedule


def _make_optimizer(name: str, scale, schedule) -> optax.GradientTransformation:
  rate = lambda step: scale * schedule(step)
  if name == 'sgd':
    return optax.sgd(rate, momentum=_MOMENTUM)
  # The bias has no trust ratio.
  matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
  return optax.lars(rate, weight_decay=0.0, momentum=_MOMENTUM, trust_ratio_mask=matrices)


def start_heads(dimension: int, classes: int, scale, optimizer: str, schedule) -> Heads:
  """Heads before the first step: small random weights, the same for all."""
  w = _INIT_DEVIATION * jax.random.truncated_normal(
    jax.random.key(0), -2.0, 2.0, (dimension, classes)
  )
  count = len(scale)
  weights = {
    'w': jnp.broadcast_to(w, (count, dimension, classes)),
    'b': jnp.zeros((count, classes)),
  }
  init = lambda weights, scale: _make_optimizer(optimizer, scale, schedule).init(weights)
  state = jax.vmap(init)(weights, scale)
  zeros, ones = jnp.zeros(dimension), jnp.ones(dimension)
  return Heads(weights, state, zeros, ones)


def make_step(optimizer: str, schedule):
  """The compiled step: (heads, scale (H,), features (B, d), labels (B,)) -> heads.

  Views with label -1 count neither in the loss nor in the statistics.
  """

  @jax.jit
  def step(heads: Heads, scale: jax.Array, x: jax.Array, y: jax.Array) -> Heads:
    usable = (y >= 0)[:, None]
    count = jnp.maximum(usable.sum(), 1)
    mean = jnp.sum(x, axis=0, where=usable) / count
    variance = jnp.sum(jnp.square(x - mean), axis=0, where=usable) / count
    normed = (x - mean) / jnp.sqrt(variance + _NORM_EPSILON)

    def one(weights, state, scale):
      def loss(weights):
        scores = normed @ weights['w'] + weights['b']
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(y, 0))
        return jnp.sum(losses, where=usable[:, 0]) / count

      grads = jax.grad(loss)(weights)
      updates, state = _make_optimizer(optimizer, scale, schedule).update(grads, state, weights)
      return optax.apply_updates(weights, updates), state

    weights, state = jax.vmap(one)(heads.weights, heads.state, scale)
    unbiased = variance * count / jnp.maximum(count - 1, 1)
    keep = lambda old, new: (1 - _NORM_MOMENTUM) * old + _NORM_MOMENTUM * new
    return Heads(weights, state, keep(heads.mean, mean), keep(heads.variance, unbiased))

  return step


def predict(heads: Heads, x: np.ndarray) -> np.ndarray:
  """Classes (H, n) of features (n, d), normalised by the running statistics."""
  x = (jnp.asarray(x) - heads.mean) / jnp.sqrt(heads.variance + _NORM_EPSILON)
  scores = jnp.einsum('nd,hdc->hnc', x, heads.weights['w']) + heads.weights['b'][:, None]
  return np.asarray(jnp.argmax(scores, axis=-1))


def _kept(subject, source, train, places, size, epochs, batch_size):
  """The features at hand, in a new order each epoch."""
  for epoch in range(epochs):
    order = np.random.default_rng((0, epoch)).permutation(places)
    for start in range(0, len(order) - size + 1, size):
      chosen = order[start : start + size]
      yield train.features[chosen], train.labels[chosen]


def _augmented(embed, subject, source, train, places, size, epochs, batch_size):
  """Features of new views of the images."""
  transform = dataclasses.replace(subject.transform, crop_scale=_CROP_SCALE, flip=True)
  numbers = tuple(train.numbers[places].tolist())
  views = data.AugmentedBatches(source, transform, numbers, size, batch_size, epochs)

  def compute(batch):
    images = batches_lib.spread(batch.images, batch_size)
    return np.asarray(embed(subject.variables, images))[: len(batch.labels)], batch.labels

  parts = batches_lib.each(subject, 'linear probe', views, compute)
  while batch := list(itertools.islice(parts, views.parts)):
    yield tuple(map(np.concatenate, zip(*batch)))


EVALUATOR = Evaluator(
  evaluate,
  {
    **PAIR,
    'layers': LAYERS,
    'optimizer': Key(str, 'lars', 'momentum 0.9, no weight decay', OPTIMIZERS),
    'epochs': Key(int, 90, 'passes over the training images', check=POSITIVE),
    'warmup_epochs': Key(int, 10, 'of these', check=NOT_NEGATIVE),
    'base_learning_rates': Key(
      tuple,
      (0.1,),
      'times probe_batch_size / 256; of several the best on a fifth of the training images',
      check=(
        lambda x: bool(x) and all(isinstance(r, (int, float)) and r > 0 for r in x),
        'one or more numbers above 0',
      ),
    ),
    'probe_batch_size': Key(int, 16_384, 'images of a step', check=POSITIVE),
    'augment': Key(bool, True, 'random crops and flips in every epoch'),
    'batch_size': at_a_time(256, 'images in the encoder'),
  },
)
