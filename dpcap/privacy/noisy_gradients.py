"""Noisy gradients of data that lie in memory: all that is private of a small training loop.

What a run on many devices does in two compiled halves (`dpcap.training.step`), on one, for models
and data that a few lines should train: a probe, a head, a baseline.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.privacy import clipping
from dpcap.privacy.keys import Keys
from dpcap.privacy.plan import PrivacyPlan

PyTree = Any


def gradient_sum(
  plan: PrivacyPlan,
  loss_fn: clipping.LossFn,
  params: PyTree,
  examples: PyTree,
  mask: jax.Array | None = None,
  *,
  clip_function: clipping.ClipFunction = clipping.Clip(),
  strategy: str = 'auto',
) -> clipping.ClippedSum:
  """What a plan adds its noise to: the clipped sum; of a plan without noise the plain one.

  See `clipped_sum` for the arguments.
  """
  if not plan.noisy:
    return clipping.plain_sum(loss_fn, params, examples, mask)
  return clipping.clipped_sum(
    loss_fn,
    params,
    examples,
    mask,
    clip_norm=plan.clip_norm,
    clip_function=clip_function,
    strategy=strategy,
  )


class NoisyGradients:
  """The noisy mean gradient of each step of a plan, one call a step.

  Formal guarantee: what all calls return together, and all that is computed from it, the
  parameters among them, is (plan.epsilon(), plan.delta)-differentially private with respect to one
  of the examples (zero-out adjacency), in real numbers (`clipped_sum` and `GaussianMechanism` say
  what rounding does), if

  - the plan has noise;
  - the keys are secret and belong to this object alone. A second one with the same keys, also in a
    process that was forked or begins again, repeats draws and noise: under other parameters, the
    difference of two returns is that of two bare gradients;
  - the parameters of each call are made from what calls before it returned, and else from nothing
    private, and `loss_fn` knows no example but its own (no mean of them, no list of their words).

  There are plan.steps calls and no more. A call that fails has used up its step. `usable` and every
  example may differ between neighbours, their number may not.

  >>> gradients = NoisyGradients(plan, Keys.from_entropy(), loss_fn, examples)  # doctest: +SKIP
  >>> for _ in range(plan.steps):  # doctest: +SKIP
  ...   grads = gradients(params)
  ...   params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  """

  def __init__(
    self,
    plan: PrivacyPlan,
    keys: Keys,
    loss_fn: clipping.LossFn,
    examples: PyTree,
    usable: np.ndarray | None = None,
    *,
    physical_batch: int = 1024,
    clip_function: clipping.ClipFunction = clipping.Clip(),
    strategy: str = 'auto',
  ):
    """Nothing is drawn or computed yet.

    Args:
      plan: of the run.
      keys: of its sampling and noise.
      loss_fn: (params, example) -> loss of one example, without its leading axis.
      examples: arrays with a leading axis of plan.dataset_size.
      usable: (plan.dataset_size,) bool; the others are drawn and contribute exactly zero. None: all
        are.
      physical_batch: examples that are computed at a time; it bears on memory and speed alone.
      clip_function, strategy: see `clipped_sum`.

    Raises:
      ValueError: if there are not plan.dataset_size of them, `usable` is no array of as many bools,
        or physical_batch is below 1.
    """
    usable = np.ones(plan.dataset_size, bool) if usable is None else np.asarray(usable)
    lengths = {np.shape(x)[:1] for x in jax.tree.leaves((examples, usable))}
    if lengths != {(plan.dataset_size,)}:
      raise ValueError(
        f'examples and usable have leading axes {sorted(lengths)}; plan.dataset_size is'
        f' {plan.dataset_size}'
      )
    if (usable.ndim, usable.dtype) != (1, bool):
      raise ValueError(
        f'usable is {usable.dtype} {usable.shape}; it must be bool ({plan.dataset_size},)'
      )
    if physical_batch < 1:
      raise ValueError(f'physical_batch is {physical_batch}; it must be at least 1')
    self._plan = plan
    self._examples = examples
    self._usable = usable
    self._physical_batch = physical_batch
    self._sampler, self._mechanism = plan.make_sampler(keys.sampling), plan.make_mechanism()
    self._noise_key = keys.noise_key()
    self._noise_state = None
    # Of an iterator no two threads get the same.
    self._steps = iter(range(plan.steps))

    def add(total, params, examples, mask):
      found = gradient_sum(
        plan, loss_fn, params, examples, mask, clip_function=clip_function, strategy=strategy
      )
      return total.add(found.sum)

    # The key is an argument: a constant would end up in compiled programs.
    def finish(noise_key, step, total, noise_state):
      noisy, noise_state = self._mechanism.add_noise(noise_key, step, total.value(), noise_state)
      # The expected batch size is public, the sampled one is not.
      return jax.tree.map(lambda g: g / plan.expected_batch_size, noisy), noise_state

    self._add, self._finish = jax.jit(add), jax.jit(finish)

  def __call__(self, params: PyTree) -> PyTree:
    """The next step's: (clipped sum + noise) / expected batch size, at these parameters.

    Raises:
      ValueError: if the plan has no step left, or it is called inside of jit, vmap, scan or the
        like, where one draw and its noise would serve many parameters.
    """
    total, size = clipping.running_sum(params), self._physical_batch
    # Inside of jit the sum is traced even where the parameters are not.
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, total))):
      raise ValueError(
        'noisy gradients are asked for inside of a transformation of JAX (jit, vmap, scan, ...),'
        ' which would repeat one draw and its noise under other parameters; call them outside'
      )
    if self._noise_state is None:
      self._noise_state = self._mechanism.init(self._noise_key, 0, params)
    # Before anything is drawn: what fails on its way is a step that may have been seen.
    step = next(self._steps, None)
    if step is None:
      raise ValueError(f'all {self._plan.steps} steps of the plan were taken; it has no more')
    drawn = self._sampler.draw(step)
    for start in range(0, len(drawn), size):
      index = np.resize(drawn[start : start + size], size)
      mask = self._usable[index] & (np.arange(size) < len(drawn) - start)
      batch = jax.tree.map(lambda x: jnp.asarray(x[index]), self._examples)
      total = self._add(total, params, batch, mask)
    grads, self._noise_state = self._finish(self._noise_key, step, total, self._noise_state)
    return grads

  def __reduce__(self):
    raise TypeError('noisy gradients cannot be copied or pickled: a copy would repeat their noise')
