"""One private step: accumulate clipped sums, add noise once, update.

accumulator = step.zero(params)
for chunk in logical batch:                      # as many as the draw needs
    accumulator = step.accumulate(state, accumulator, chunk)
state, noise_state, diagnostics, digest = step.update(
    state, accumulator, noise_key, noise_state)

Each row of the mesh adds up the physical batches that it is given, by itself: no device
waits for another while a logical batch goes on. Then every parameter's sums are reduced once,
each device getting its shard, which it adds its part of the one noise to and steps its part of
the optimizer with; the new parameters are gathered once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from dpcap import data, privacy
from dpcap.training.mesh import DATA, Layout

PyTree = Any


class TrainState(NamedTuple):
  """What a checkpoint holds, and all that the next step depends on besides the keys.

  Attributes:
    step: int32 (), logical batches done.
    params: trained parameters, float32.
    frozen: the model's other tensors, never changed.
    opt_state: the optimizer's.
    average: of the parameters over the steps, float32; None: the run keeps none.
  """

  step: jax.Array
  params: PyTree
  frozen: PyTree
  opt_state: PyTree
  average: PyTree | None = None

  @property
  def variables(self) -> PyTree:
    """What is evaluated: {'params', 'frozen'}, the average of the parameters where there is one."""
    params = self.params if self.average is None else self.average
    return {'params': params, 'frozen': self.frozen}


class Accumulator(NamedTuple):
  """Running sums over a logical batch, one for each row of the mesh.

  All but `sum` is diagnostics: private.

  Attributes:
    sum: clipped gradients, float32, (rows, ...) as params; compensated.
    examples: (rows,) that contributed, or would have but for an unusable gradient.
    unusable: (rows,) examples whose gradient was not finite: they contributed zero.
    clipped: (rows,) examples whose gradient was scaled down.
    loss: (rows,) sum of finite losses.
    norm: (rows,) sum of finite gradient norms.
  """

  sum: privacy.RunningSum
  examples: jax.Array
  unusable: jax.Array
  clipped: jax.Array
  loss: jax.Array
  norm: jax.Array


def example_loss(model: nn.Module, frozen: PyTree) -> privacy.clipping.LossFn:
  """The loss of one example, as `loss_fn(params, Example) -> scalar`.

  That of several views of a record is their mean: one gradient, clipped as a whole.
  """

  def loss_fn(params, example: data.Example):
    variables = {'params': params, 'frozen': frozen}
    fields = example | {'image': data.normalize(example['image'])}
    losses = model.apply(variables, *(fields[name] for name in model.INPUTS))
    return jnp.mean(losses) if losses.ndim else losses

  return loss_fn


def init_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  layout: Layout,
  shapes: Mapping[str, Any],
  seed: int,
  averaged: bool = False,
) -> TrainState:
  """Initial parameters, from a public seed and no data, laid out as `Step` keeps them.

  Args:
    model: what is trained.
    optimizer: its state begins with the parameters.
    layout: which device holds what.
    shapes: field -> its shape and type in one example.
    seed: of the parameters.
    averaged: whether the run keeps an average of the parameters.
  """

  def init():
    example = {name: jnp.zeros(field.shape, field.dtype) for name, field in shapes.items()}
    fields = example | {'image': data.normalize(example['image'])}
    variables = model.init(jax.random.key(seed), *(fields[name] for name in model.INPUTS))
    params, frozen = variables['params'], variables.get('frozen', {})
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      frozen=frozen,
      opt_state=optimizer.init(params),
      average=params if averaged else None,
    )

  return jax.jit(init, out_shardings=state_layout(layout, jax.eval_shape(init)))()


def state_layout(layout: Layout, state: TrainState) -> TrainState:
  """The shardings of a state: parameters whole in each row, what updates need in shards."""
  whole = lambda tree: jax.tree.map(lambda _: layout.whole(), tree)
  return TrainState(
    step=layout.whole(),
    params=layout.params(state.params),
    frozen=whole(state.frozen),
    opt_state=layout.shards(state.opt_state),
    average=layout.shards(state.average),
  )


@dataclasses.dataclass(frozen=True)
class Step:
  """The two compiled halves of a step, and what they begin with.

  Attributes:
    zero: (params) -> the empty accumulator.
    accumulate: (state, accumulator, examples, mask, live) -> accumulator; the examples'
      leading axes are (rows, batches, physical batch); of the batches of row r the first
      live[r] are summed. The accumulator is donated.
    update: (state, accumulator, noise_key, noise_state) -> (state, noise_state, diagnostics,
      digest), the last of the noisy sum (`privacy.digest`). The state is donated. The key is
      an argument: a constant would end up in compiled programs and their caches on disk.
  """

  zero: Callable[[PyTree], Accumulator]
  accumulate: Callable[..., Accumulator]
  update: Callable[..., tuple[TrainState, PyTree, dict[str, jax.Array], jax.Array]]


def make_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  plan: privacy.PrivacyPlan,
  layout: Layout,
  clipping: str = 'auto',
  clip_function: privacy.ClipFunction = privacy.Clip(),
  ema_decay: float | None = None,
) -> Step:
  """The step of a run.

  Args:
    model: its call is the loss of one example.
    optimizer: applied to the noisy mean gradient.
    plan: the privacy parameters.
    layout: which device holds what.
    clipping: strategy of `clipped_sum`; a plan without noise takes the plain sum.
    clip_function: from gradient norms to the factors that examples are scaled by.
    ema_decay: of the average of the parameters; None: the state has none.
  """
  mechanism = plan.make_mechanism()

  def gradient_sum(frozen, params, examples, mask) -> privacy.ClippedSum:
    loss_fn = example_loss(model, frozen)
    return privacy.gradient_sum(
      plan, loss_fn, params, examples, mask, clip_function=clip_function, strategy=clipping
    )

  # Rows are apart in here; what their model axis does is left to the compiler.
  in_each_row = functools.partial(
    jax.shard_map, mesh=layout.mesh, axis_names={DATA}, check_vma=False
  )
  of_row, shared = PartitionSpec(DATA), PartitionSpec()

  def zero(params) -> Accumulator:
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct((layout.rows, *p.shape), p.dtype), params)
    accumulator = Accumulator(
      privacy.running_sum(like), *(jnp.zeros(layout.rows, jnp.float32) for _ in range(5))
    )
    return jax.lax.with_sharding_constraint(accumulator, layout.sums_of_rows(accumulator))

  @functools.partial(
    in_each_row, in_specs=(shared, shared, of_row, of_row, of_row, of_row), out_specs=of_row
  )
  def accumulate_in_row(params, frozen, accumulator, examples, mask, live):
    accumulator, examples, mask, live = jax.tree.map(
      lambda x: x[0], (accumulator, examples, mask, live)
    )

    def add(i, acc: Accumulator) -> Accumulator:
      batch, used = jax.tree.map(lambda x: x[i], (examples, mask))
      out = gradient_sum(frozen, params, batch, used)
      finite_norm = jnp.where(jnp.isfinite(out.norms), out.norms, 0.0)
      unusable = out.factors == 0
      return Accumulator(
        sum=acc.sum.add(out.sum),
        examples=acc.examples + jnp.sum(used),
        unusable=acc.unusable + jnp.sum(unusable & used),
        clipped=acc.clipped + jnp.sum((out.factors < 1) & used & ~unusable),
        loss=acc.loss + jnp.sum(jnp.where(jnp.isfinite(out.losses), out.losses, 0.0)),
        norm=acc.norm + jnp.sum(finite_norm),
      )

    # The trip count is data, not shape: padding costs nothing and nothing recompiles.
    return jax.tree.map(lambda x: x[None], jax.lax.fori_loop(0, live, add, accumulator))

  def accumulate(state: TrainState, accumulator: Accumulator, examples, mask, live):
    out = accumulate_in_row(state.params, state.frozen, accumulator, examples, mask, live)
    return jax.lax.with_sharding_constraint(out, layout.sums_of_rows(out))

  def reduce(sums: PyTree) -> PyTree:
    """Sums (rows, ...) over the rows; each device gets its shard."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sums)
    specs = lambda shardings: jax.tree.map(lambda s: s.spec, shardings)

    def over_rows(x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
      axis = layout.scattered_axis(whole.shape)
      if axis is None:
        return jax.lax.psum(x[0], DATA)
      return jax.lax.psum_scatter(x[0], DATA, scatter_dimension=axis, tiled=True)

    return jax.shard_map(
      lambda sums: jax.tree.map(over_rows, sums, like),
      mesh=layout.mesh,
      in_specs=(specs(layout.sums_of_rows(sums)),),
      out_specs=specs(layout.shards(like)),
    )(sums)

  def update(state: TrainState, accumulator: Accumulator, noise_key, noise_state):
    # Drawn outside of shard_map, where a shared key gives one logical array and not the
    # same numbers on every shard.
    clipped = reduce(accumulator.sum.value())
    noisy, noise_state = mechanism.add_noise(noise_key, state.step, clipped, noise_state)
    counts = jax.tree.map(jnp.sum, accumulator._replace(sum=None))
    # The digest is of the same numbers that the optimizer takes.
    noisy = privacy.settled(noisy, counts.examples)
    digest = jax.lax.with_sharding_constraint(privacy.digest(noisy), layout.whole())
    # The expected batch size is public, the sampled one is not.
    grads = jax.tree.map(lambda g: g / plan.expected_batch_size, noisy)
    grads = jax.lax.with_sharding_constraint(grads, layout.shards(grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      frozen=state.frozen,
      opt_state=opt_state,
      average=None if ema_decay is None else _averaged(state, params, ema_decay),
    )
    new_state = jax.lax.with_sharding_constraint(new_state, state_layout(layout, new_state))
    return new_state, noise_state, _diagnostics(counts, plan.noisy), digest

  return Step(
    zero=jax.jit(zero),
    accumulate=jax.jit(accumulate, donate_argnums=1),
    update=jax.jit(update, donate_argnums=0),
  )


def _averaged(state: TrainState, params: PyTree, decay: float) -> PyTree:
  """The average with new parameters; early on it forgets faster, as in Sander et al. 2023."""
  t = state.step.astype(jnp.float32)
  kept = jnp.minimum(decay, (1 + t) / (10 + t))
  # As a step towards the new ones, which loses less where the decay is close to 1.
  return jax.tree.map(lambda a, p: a + (1 - kept) * (p - a), state.average, params)


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
