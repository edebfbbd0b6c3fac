"""What makes training private; usable on its own, with any JAX model.

A private step in full: draw a batch, sum its clipped gradients, add noise once,
divide by the expected batch size.

>>> import jax, jax.numpy as jnp, numpy as np
>>> from dpcap import privacy
>>> plan = privacy.calibrate(epsilon=1.0, dataset_size=1000, expected_batch_size=100,
...                          steps=50, delta=1e-3, clip_norm=1.0)
>>> keys = privacy.Keys.from_entropy()
>>> sampler = plan.make_sampler(keys.sampling)
>>> mechanism = plan.make_mechanism()
>>> noise_key = keys.noise_key()
>>> def loss_fn(params, example):  # one example in, one number out
...   return (example['x'] @ params['w'] - example['y']) ** 2
>>> params = {'w': jnp.zeros(3)}
>>> x, y = np.random.normal(size=(1000, 3)), np.ones(1000)
>>> noise_state = mechanism.init(noise_key, 0, params)
>>> for step in range(2):
...   drawn = sampler.draw(step)
...   batch = {'x': x[drawn], 'y': y[drawn]}
...   clipped = privacy.clipped_sum(loss_fn, params, batch, clip_norm=plan.clip_norm)
...   noisy, noise_state = mechanism.add_noise(noise_key, step, clipped.sum, noise_state)
...   params = jax.tree.map(lambda p, g: p - 0.1 * g / plan.expected_batch_size, params, noisy)
>>> params['w'].shape
(3,)

In a real run pad the drawn batch to a fixed size and pass `mask`, so that the
step compiles once.
"""

from dpcap.privacy.accounting import ACCOUNTANTS
from dpcap.privacy.clip_functions import CLIP_FUNCTIONS, Automatic, Clip, ClipFunction
from dpcap.privacy.clipping import (
  CLIPPING_STRATEGIES,
  ClippedSum,
  choose_strategy,
  clipped_sum,
  plain_sum,
)
from dpcap.privacy.clipping_check import ClippingMismatch, check_clipping
from dpcap.privacy.keys import Keys, KeyStore
from dpcap.privacy.mechanisms import MECHANISMS
from dpcap.privacy.plan import PrivacyPlan, calibrate
from dpcap.privacy.sampling import SAMPLERS
from dpcap.privacy.statement import make_statement, statement_text
from dpcap.privacy.summation import RunningSum, running_sum
from dpcap.privacy.uses import ClippingFallbackWarning

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
  'PrivacyPlan',
  'RunningSum',
  'SAMPLERS',
  'calibrate',
  'check_clipping',
  'choose_strategy',
  'clipped_sum',
  'make_statement',
  'plain_sum',
  'running_sum',
  'statement_text',
]
