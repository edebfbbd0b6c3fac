"""A linear probe that is itself trained with DP-SGD: a guarantee for the downstream images too.

The features come from a model whose training data its own statement covers. What the probe sees of
the downstream training images is clipped and noised by `dpcap.privacy`, as in pre-training.
"""

import jax
import numpy as np
import optax

from dpcap import data, privacy
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals import features as features_lib
from dpcap.evals import logistic
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import CHOICE, PAIR, Evaluator, at_a_time
from dpcap.evals.knn import unit
from dpcap.evals.progress import track
from dpcap.evals.subject import Result, Subject
from dpcap.key import FRACTION, POSITIVE, Key

_AT_ONCE = 1024  # examples of a physical batch
_CLIPPING = 'bookkeeping'


def evaluate(
  subject: Subject,
  *,
  train,
  test,
  features: str,
  layers: str | None = None,
  epsilon: float,
  delta: float | None,
  clip_norm: float,
  expected_batch_size: int,
  steps: int,
  learning_rate: float,
  batch_size: int,
) -> Result:
  """Top-1 accuracy of a private probe on test images, which are taken to be public.

  Formal guarantee: the probe's weights, all of its steps included, are (epsilon, delta)-
  differentially private with respect to one image of the train source and its label (zero-out
  adjacency; N = length of the source, unusable images contribute zero). Sampling and noise keys are
  fresh from the operating system's entropy and never stored. Nothing is chosen by the data: features
  get norm 1 by themselves, and all settings are given; whoever tunes them on the private images pays
  for that separately. That the sources fit together is checked on the private labels.

  Args:
    subject: the model.
    train, test: source sections of the config, with the same classes.
    features: one of `features.FEATURES`.
    layers: of the model, see `features.choose`.
    epsilon: of the probe; the noise is calibrated to it (PLD).
    delta: None: 1 / N.
    clip_norm: of an example's gradient.
    expected_batch_size: of a Poisson-sampled batch; at most N.
    steps: noisy gradients.
    learning_rate: of SGD with momentum 0.9, falling to zero as a cosine.
    batch_size: images at a time while features are extracted.

  Returns:
    The details hold the guarantee under `privacy`.

  Raises:
    UserError: if the sources do not belong together, or no noise meets epsilon.
  """
  choice = features_lib.choose('private_probe', subject.model, features, layers)
  source, test_source = features_lib.make_pair(subject, 'private_probe', train, test)
  pair = features_lib.checked_pair(
    'private_probe',
    *(features_lib.extract(subject, s, choice, batch_size) for s in (source, test_source)),
    source.class_names,
  )
  try:
    plan = privacy.calibrate(
      epsilon=epsilon,
      dataset_size=len(source),
      expected_batch_size=expected_batch_size,
      steps=steps,
      delta=1 / len(source) if delta is None else delta,
      clip_norm=clip_norm,
    )
  except ValueError as e:
    raise UserError(f'private_probe: {e}') from e
  # Every process trains the same probe.
  keys = batches_lib.exchange(tuple(privacy.Keys.from_entropy()))[0]
  weights = fit(plan, privacy.Keys(*keys), pair.train, len(pair.classes), learning_rate)
  predicted = np.asarray(logistic.predict(weights, unit(pair.test.features)))
  groups = getattr(source, 'groups', None)
  statement = privacy.make_statement(
    plan,
    steps=plan.steps,
    releases=plan.steps,
    clipping_strategy=_CLIPPING,
    clip_function=str(privacy.Clip()),
    unit=data.unit(('image', 'label'), groups),
    keys_are_stored=False,
    not_covered=[
      *([groups.not_covered] if groups else []),
      "the images that the features were trained on, for which the model's own statement speaks",
      'test images, and which classes the training images have',
    ],
  )
  return top1(predicted, pair.test.labels, pair.classes, **choice._asdict(), privacy=statement)


def fit(
  plan: privacy.PrivacyPlan,
  keys: privacy.Keys,
  train: features_lib.Labelled,
  num_classes: int,
  learning_rate: float,
) -> logistic.Weights:
  """The weights after all steps of the plan.

  Args:
    plan: whose dataset_size is the length of the source.
    keys: secret.
    train: its usable images; `numbers` are their places in the source.
    num_classes: number of classes.
    learning_rate: at the start.
  """
  # Zeros stand for images that cannot be used: they are drawn, and masked.
  usable = np.zeros(plan.dataset_size, bool)
  x = np.zeros((plan.dataset_size, train.features.shape[1]), np.float32)
  y = np.zeros(plan.dataset_size, np.int32)
  usable[train.numbers] = True
  x[train.numbers], y[train.numbers] = unit(train.features), train.labels

  def loss_fn(weights, example):
    x, y = example
    return -jax.nn.log_softmax(logistic.logits(weights, x))[y]

  optimizer = optax.sgd(optax.cosine_decay_schedule(learning_rate, plan.steps), momentum=0.9)

  @jax.jit
  def update(weights, state, grads):
    updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state

  gradients = privacy.NoisyGradients(
    plan, keys, loss_fn, (x, y), usable, physical_batch=_AT_ONCE, strategy=_CLIPPING
  )
  weights = logistic.zeros(x.shape[1], num_classes, intercept=True)
  state = optimizer.init(weights)
  for _ in track('private probe', range(plan.steps), plan.steps, 'steps'):
    weights, state = update(weights, state, gradients(weights))
  return weights


EVALUATOR = Evaluator(
  evaluate,
  {
    **PAIR,
    **CHOICE,
    'epsilon': Key(float, 1.0, 'of the probe, for its training images', check=POSITIVE),
    'delta': Key(float, None, 'None: 1 / N', check=FRACTION, optional=True),
    'clip_norm': Key(float, 1.0, "of an example's gradient", check=POSITIVE),
    'expected_batch_size': Key(int, 1024, 'Poisson-sampled', check=POSITIVE),
    'steps': Key(int, 200, 'noisy gradients', check=POSITIVE),
    'learning_rate': Key(float, 4.0, 'at the start; falls to zero as a cosine', check=POSITIVE),
    'batch_size': at_a_time(256),
  },
)
