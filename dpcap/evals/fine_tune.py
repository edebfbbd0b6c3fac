"""Fine-tuning of the whole encoder with a linear head on the model's default features.

AdamW with layer-wise decay of the learning rate, warmup and cosine, as MAE and BEiT have it (He et al.
2022, appendix A.1; Bao et al. 2022), with random crops, flips and label smoothing; without their mixup,
cutmix, RandAugment and drop path.
"""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals import features as features_lib
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import PAIR, Evaluator, at_a_time
from dpcap.evals.subject import Result, Subject
from dpcap.key import FRACTION, NOT_NEGATIVE, POSITIVE, Key

PyTree = Any

_CROP_SCALE = (0.08, 1.0)
_BETAS = (0.9, 0.999)
_HEAD_DEVIATION = 2e-5


def evaluate(
  subject: Subject,
  *,
  train,
  test,
  epochs: int,
  warmup_epochs: int,
  base_learning_rate: float,
  layer_decay: float,
  weight_decay: float,
  label_smoothing: float,
  train_batch_size: int,
  batch_size: int,
) -> Result:
  """Top-1 accuracy of the fine-tuned model, with its 95% interval.

  The learning rate is base_learning_rate * train_batch_size / 256. Nothing is chosen by results: all
  settings are given, the test set is looked at once. The decoder takes no part.

  Args:
    subject: the model; it stays as it is.
    train, test: source sections of the config, with the same classes.
    epochs: passes over the training images.
    warmup_epochs: of these.
    base_learning_rate: of the head.
    layer_decay: a layer's rate is that of the one above times this.
    weight_decay: of matrices.
    label_smoothing: share of the probability that goes to all classes alike.
    train_batch_size: images of a step, or all of them where there are fewer.
    batch_size: images at a time; gradients of a step's parts are added up.

  Raises:
    UserError: if the sources do not belong together, or no training image can be used.
  """
  source, test_source = features_lib.make_pair(subject, 'fine_tune', train, test)
  classes = source.class_names
  size = min(train_batch_size, len(source))
  transform = dataclasses.replace(subject.transform, crop_scale=_CROP_SCALE, flip=True)
  numbers = tuple(range(len(source)))
  views = data.AugmentedBatches(source, transform, numbers, size, min(batch_size, size), epochs)

  variables = subject.variables
  tuned = {name: variables['params'][name] for name in subject.model.FEATURE_PARTS}
  tuned['head'] = _make_head(subject, len(classes))
  warmup = views.per_epoch * min(warmup_epochs, epochs)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, base_learning_rate * size / 256, warmup, max(views.per_epoch * epochs, warmup + 1)
  )
  optimizer = make_optimizer(tuned, schedule, layer_decay, weight_decay)

  def scores(tuned, images):
    params = variables['params'] | {k: v for k, v in tuned.items() if k != 'head'}
    x = subject.model.apply(
      variables | {'params': params}, data.normalize(images), method='features'
    )
    return x @ tuned['head']['kernel'] + tuned['head']['bias']

  def loss_sum(tuned, images, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, len(classes)), label_smoothing)
    losses = optax.softmax_cross_entropy(scores(tuned, images), targets)
    return jnp.sum(losses, where=labels >= 0)

  @jax.jit
  def add(grads, tuned, images, labels):
    return jax.tree.map(jnp.add, grads, jax.grad(loss_sum)(tuned, images, labels))

  @jax.jit
  def update(tuned, state, grads, count):
    grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
    updates, state = optimizer.update(grads, state, tuned)
    return optax.apply_updates(tuned, updates), state

  spread = lambda batch: (
    batches_lib.spread(batch.images, views.at_once),
    # Rows that fill up have no label.
    batches_lib.spread(batch.labels + 1, views.at_once) - 1,
  )
  state, zeros = optimizer.init(tuned), jax.tree.map(jnp.zeros_like, tuned)
  trained_on = 0
  parts = batches_lib.each(subject, 'fine-tuning', views, lambda batch: batch)
  while of_step := list(itertools.islice(parts, views.parts)):
    grads, count = zeros, 0
    for part in of_step:
      grads = add(grads, tuned, *spread(part))
      count += int(np.sum(part.labels >= 0))
    tuned, state = update(tuned, state, grads, count)
    trained_on += count
  if not trained_on:
    raise UserError('fine_tune: the train source has no usable labelled image')

  answer = jax.jit(lambda tuned, images: jnp.argmax(scores(tuned, images), axis=-1))

  def compute(batch):
    images = batches_lib.spread(batch.images, batch_size)
    return np.asarray(answer(tuned, images))[: len(batch.labels)], batch.labels

  batches = data.EvaluationBatches(test_source, subject.transform, batch_size)
  answers = list(batches_lib.each(subject, 'fine-tuned model', batches, compute))
  predicted, labels = map(np.concatenate, zip(*answers))
  if not np.any(labels >= 0):
    raise UserError('fine_tune: the test source has no usable labelled image')
  return top1(predicted[labels >= 0], labels[labels >= 0], classes, n_train=len(source))


def _make_head(subject: Subject, classes: int) -> PyTree:
  size = subject.transform.image_size
  features = lambda image: subject.model.apply(subject.variables, image, method='features')
  image = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
  dimension = jax.eval_shape(features, image).shape[-1]
  kernel = jax.random.truncated_normal(jax.random.key(0), -2.0, 2.0, (dimension, classes))
  return {'kernel': _HEAD_DEVIATION * kernel, 'bias': jnp.zeros(classes)}


def make_optimizer(
  params: PyTree, schedule: optax.Schedule, layer_decay: float, weight_decay: float
) -> optax.GradientTransformation:
  """AdamW whose updates are multiplied by `layer_scales`; weight decay of matrices alone."""
  scales = layer_scales(params, layer_decay)
  layer_wise = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))
  matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
  adam = optax.adamw(schedule, *_BETAS, weight_decay=weight_decay, mask=matrices)
  return optax.chain(adam, layer_wise)


def layer_scales(params: PyTree, layer_decay: float) -> PyTree:
  """The share of the learning rate that each parameter gets.

  With D blocks: layer_decay^(D + 1) what is before the first block, layer_decay^(D - i) block i
  (from 0), 1 what comes after the last.
  """
  blocks = [name for name in params['encoder'] if name.startswith('block_')]

  def scale(path, _):
    names = jax.tree_util.keystr(path, simple=True, separator='/')
    if block := re.match(r'encoder/block_(\d+)/', names):
      return layer_decay ** (len(blocks) - int(block[1]))
    before_blocks = names.startswith('encoder/') and not names.startswith('encoder/norm')
    return layer_decay ** (len(blocks) + 1) if before_blocks else 1.0

  return jax.tree_util.tree_map_with_path(scale, params)


EVALUATOR = Evaluator(
  evaluate,
  {
    **PAIR,
    'epochs': Key(int, 100, 'passes over the training images', check=POSITIVE),
    'warmup_epochs': Key(int, 5, 'of these', check=NOT_NEGATIVE),
    'base_learning_rate': Key(float, 5e-4, 'times train_batch_size / 256', check=POSITIVE),
    'layer_decay': Key(
      float,
      0.65,
      "a layer's learning rate over that of the layer above",
      check=(lambda x: 0 < x <= 1, 'above 0, at most 1'),
    ),
    'weight_decay': Key(float, 0.05, 'of matrices', check=NOT_NEGATIVE),
    'label_smoothing': Key(float, 0.1, 'share that all classes have alike', check=FRACTION),
    'train_batch_size': Key(int, 1024, 'images of a step', check=POSITIVE),
    'batch_size': at_a_time(64),
  },
  needs='FEATURE_PARTS',
)
