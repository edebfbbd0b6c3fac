"""One private step: accumulate clipped sums, add noise once, update.

accumulator = zero_accumulator(params)
for chunk in logical batch:                      # as many as the draw needs
    accumulator = step.accumulate(state, accumulator, chunk)
state, noise_state, diagnostics = step.update(state, accumulator, noise_key, noise_state)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpcap import data, privacy

PyTree = Any


class TrainState(NamedTuple):
  """What a checkpoint holds, and all that the next step depends on besides the keys.

  Attributes:
    step: int32 (), logical batches done.
    params: trained parameters, float32.
    frozen: the model's other tensors, never changed.
    opt_state: the optimizer's.
  """

  step: jax.Array
  params: PyTree
  frozen: PyTree
  opt_state: PyTree


class Accumulator(NamedTuple):
  """Running sums over a logical batch. All but `sum` is diagnostics: private.

  Attributes:
    sum: clipped gradients, float32, like params; compensated.
    examples: () that contributed, or would have but for an unusable gradient.
    unusable: () examples whose gradient was not finite: they contributed zero.
    clipped: () examples whose gradient was scaled down.
    loss: () sum of finite losses.
    norm: () sum of finite gradient norms.
  """

  sum: privacy.RunningSum
  examples: jax.Array
  unusable: jax.Array
  clipped: jax.Array
  loss: jax.Array
  norm: jax.Array


def zero_accumulator(params: PyTree) -> Accumulator:
  """The empty sum."""
  zero = [jnp.zeros((), jnp.float32) for _ in range(5)]
  return Accumulator(privacy.running_sum(params), *zero)


def example_loss(model: nn.Module, frozen: PyTree) -> privacy.clipping.LossFn:
  """The loss of one example, as `loss_fn(params, Examples) -> scalar`."""

  def loss_fn(params, example: data.Examples):
    variables = {'params': params, 'frozen': frozen}
    return model.apply(variables, data.normalize(example.image), example.tokens)

  return loss_fn


def init_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  image_size: int,
  text_length: int,
  seed: int,
) -> TrainState:
  """Initial parameters, from a public seed and no data."""
  image = jnp.zeros((image_size, image_size, 3), jnp.float32)
  tokens = jnp.ones((text_length,), jnp.int32)

  @jax.jit
  def init():
    variables = model.init(jax.random.key(seed), image, tokens)
    params, frozen = variables['params'], variables.get('frozen', {})
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))

  return init()


@dataclasses.dataclass(frozen=True)
class Step:
  """The two compiled halves of a step.

  Attributes:
    accumulate: (state, accumulator, examples, mask, live) -> accumulator; the examples'
      leading axes are (batches, physical batch), the first `live` of which are summed.
      The accumulator is donated.
    update: (state, accumulator, noise_key, noise_state) -> (state, noise_state, diagnostics).
      The state is donated. The key is an argument: a constant would end up in
      compiled programs and their caches on disk.
  """

  accumulate: Callable[..., Accumulator]
  update: Callable[..., tuple[TrainState, PyTree, dict[str, jax.Array]]]


def make_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  plan: privacy.PrivacyPlan,
  clipping: str = 'auto',
  clip_function: privacy.ClipFunction = privacy.Clip(),
) -> Step:
  """The step of a run.

  Args:
    model: its call is the loss of one example.
    optimizer: applied to the noisy mean gradient.
    plan: the privacy parameters.
    clipping: strategy of `clipped_sum`; a plan without privacy takes the plain sum.
    clip_function: from gradient norms to the factors that examples are scaled by.
  """
  mechanism = plan.make_mechanism()

  def gradient_sum(frozen, params, examples, mask) -> privacy.ClippedSum:
    loss_fn = example_loss(model, frozen)
    if not plan.private:
      return privacy.plain_sum(loss_fn, params, examples, mask)
    return privacy.clipped_sum(
      loss_fn,
      params,
      examples,
      mask,
      clip_norm=plan.clip_norm,
      clip_function=clip_function,
      strategy=clipping,
    )

  def accumulate(state: TrainState, accumulator: Accumulator, examples, mask, live):
    def add(i, acc: Accumulator) -> Accumulator:
      batch, used = jax.tree.map(lambda x: x[i], (examples, mask))
      out = gradient_sum(state.frozen, state.params, batch, used)
      finite_norm = jnp.where(jnp.isfinite(out.norms), out.norms, 0.0)
      unusable = ~jnp.isfinite(out.norms if plan.private else out.losses)
      return Accumulator(
        sum=acc.sum.add(out.sum),
        examples=acc.examples + jnp.sum(used),
        unusable=acc.unusable + jnp.sum(unusable & used),
        clipped=acc.clipped + jnp.sum((out.factors < 1) & used & ~unusable),
        loss=acc.loss + jnp.sum(jnp.where(jnp.isfinite(out.losses), out.losses, 0.0)),
        norm=acc.norm + jnp.sum(finite_norm),
      )

    # The trip count is data, not shape: padding costs nothing and nothing recompiles.
    return jax.lax.fori_loop(0, live, add, accumulator)

  def update(state: TrainState, accumulator: Accumulator, noise_key, noise_state):
    clipped = accumulator.sum.value()
    noisy, noise_state = mechanism.add_noise(noise_key, state.step, clipped, noise_state)
    # The expected batch size is public, the sampled one is not.
    grads = jax.tree.map(lambda g: g / plan.expected_batch_size, noisy)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      frozen=state.frozen,
      opt_state=opt_state,
    )
    return new_state, noise_state, _diagnostics(accumulator, plan.private)

  return Step(
    accumulate=jax.jit(accumulate, donate_argnums=1),
    update=jax.jit(update, donate_argnums=0),
  )


def _diagnostics(accumulator: Accumulator, private: bool) -> dict[str, jax.Array]:
  usable = jnp.maximum(accumulator.examples - accumulator.unusable, 1)
  diagnostics = {
    # Where no example was usable there is no loss to tell.
    'loss': jnp.where(
      accumulator.examples > accumulator.unusable, accumulator.loss / usable, jnp.nan
    ),
    'examples': accumulator.examples,
    'unusable_gradients': accumulator.unusable,
  }
  if private:
    diagnostics |= {
      'gradient_norm': accumulator.norm / usable,
      'clip_fraction': accumulator.clipped / usable,
    }
  return diagnostics
