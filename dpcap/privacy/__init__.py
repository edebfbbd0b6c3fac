"""What makes training private; usable on its own, with any JAX model.

A private step in full, for a model that knows nothing of this project: draw a batch, sum
its clipped gradients, add noise once, divide by the expected batch size.

>>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
>>> from dpcap import privacy
>>> plan = privacy.calibrate(epsilon=1.0, dataset_size=1000, expected_batch_size=100,
...                          steps=50, delta=1e-3, clip_norm=1.0)
>>> keys = privacy.Keys.from_entropy()
>>> sampler = plan.make_sampler(keys.sampling)
>>> mechanism = plan.make_mechanism()
>>> noise_key = keys.noise_key()
>>> class Classifier(nn.Module):
...   @nn.compact
...   def __call__(self, image):
...     x = nn.relu(nn.Conv(8, (3, 3), strides=2)(image))
...     x = nn.LayerNorm()(x).reshape(*x.shape[:-3], -1, 8)
...     x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
...     return nn.Dense(10)(x.mean(-2))
>>> model = Classifier()
>>> def loss_fn(params, example):  # one example in, one number out
...   logits = model.apply(params, example['image'])
...   return -jax.nn.log_softmax(logits)[example['label']]
>>> images = np.random.normal(size=(1000, 8, 8, 1)).astype(np.float32)
>>> data = {'image': images, 'label': np.random.randint(10, size=1000)}
>>> params = model.init(jax.random.key(0), data['image'][0])
>>> @jax.jit
... def clipped_sum(params, batch, mask):
...   return privacy.clipped_sum(loss_fn, params, batch, mask, clip_norm=plan.clip_norm)
>>> noise_state = mechanism.init(noise_key, 0, params)
>>> for step in range(2):
...   drawn = sampler.draw(step)
...   total = privacy.running_sum(params)
...   for start in range(0, len(drawn), 32):  # physical batches of one size: compiled once
...     index = np.resize(drawn[start : start + 32], 32)
...     mask = np.arange(32) < len(drawn) - start
...     batch = jax.tree.map(lambda x: x[index], data)
...     total = total.add(clipped_sum(params, batch, mask).sum)
...   noisy, noise_state = mechanism.add_noise(noise_key, step, total.value(), noise_state)
...   params = jax.tree.map(lambda p, g: p - 0.1 * g / plan.expected_batch_size, params, noisy)
>>> params['params']['Dense_0']['kernel'].shape
(8, 10)

`NoisyGradients` is that loop for data in memory, and refuses a step more than the plan has:

>>> gradients = privacy.NoisyGradients(plan, privacy.Keys.from_entropy(), loss_fn, data)
>>> params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients(params))

No layer is known to `clipped_sum` by name: it reads the trace of `loss_fn`, and the gradients
of single examples are never formed for what is a matrix product, a convolution or a lookup
there. Parameters used in any other way are clipped by vmap, and a warning names them where
that is costly. Several views of one example (augmentation multiplicity) are one unit when the
loss of one example is the mean over its views:

>>> def loss_of_views(params, example):  # example['image']: (views, 8, 8, 1)
...   view = lambda image: loss_fn(params, example | {'image': image})
...   return jnp.mean(jax.vmap(view)(example['image']))
>>> two = {'image': images[:6].reshape(3, 2, 8, 8, 1), 'label': data['label'][:3]}
>>> privacy.clipped_sum(loss_of_views, params, two, clip_norm=1.0).norms.shape
(3,)

`privacy.check_clipping` compares the result with plain vmap, for a model of your own.
"""

from dpcap.privacy.accounting import ACCOUNTANTS
from dpcap.privacy.clipping import (
  CLIP_FUNCTIONS,
  CLIPPING_STRATEGIES,
  Automatic,
  Clip,
  ClipFunction,
  ClippedSum,
  ClippingFallbackWarning,
  ClippingMismatch,
  MixedExamplesError,
  RunningSum,
  check_clipping,
  choose_strategy,
  clipped_sum,
  plain_sum,
  running_sum,
  settled,
)
from dpcap.privacy.digests import digest
from dpcap.privacy.keys import Keys, KeyStore
from dpcap.privacy.mechanisms import MECHANISMS
from dpcap.privacy.noisy_gradients import NoisyGradients, gradient_sum
from dpcap.privacy.plan import PrivacyPlan, calibrate
from dpcap.privacy.provenance import foreign_statement, is_generated, make_start
from dpcap.privacy.sampling import SAMPLERS
from dpcap.privacy.statement import make_statement, statement_text

__all__ = [
  'ACCOUNTANTS',
  'Automatic',
  'CLIP_FUNCTIONS',
  'CLIPPING_STRATEGIES',
  'Clip',
  'ClipFunction',
  'ClippedSum',
  'ClippingFallbackWarning',
  'ClippingMismatch',
  'Keys',
  'KeyStore',
  'MECHANISMS',
  'MixedExamplesError',
  'NoisyGradients',
  'PrivacyPlan',
  'RunningSum',
  'SAMPLERS',
  'calibrate',
  'check_clipping',
  'choose_strategy',
  'clipped_sum',
  'digest',
  'foreign_statement',
  'gradient_sum',
  'is_generated',
  'make_start',
  'make_statement',
  'plain_sum',
  'running_sum',
  'settled',
  'statement_text',
]
