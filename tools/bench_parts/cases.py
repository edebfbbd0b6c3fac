"""What is timed: one combination of model and batch, and each strategy's program for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.errors import UserError
from dpcap.models import SIZES, make_model
from dpcap.privacy import clipped_sum

PyTree = Any

PLAIN = 'plain'
MATMUL = 'matmul'

# Large enough to run at the machine's speed, small enough to cost little of a round.
_MATMUL_SIDE = {'cpu': 1024}
_MATMUL_SIDE_ELSEWHERE = 8192


class Case(NamedTuple):
  """One combination of the options.

  Attributes:
    size: key of SIZES.
    depth: blocks of the encoder.
    image_size: pixels.
    batch: examples; None while the largest is still to be found.
    vocab: number of token ids.
    dtype: compute type, 'float32' or 'bfloat16'.
    text_length: tokens of a caption.
  """

  size: str
  depth: int
  image_size: int
  batch: int | None
  vocab: int
  dtype: str
  text_length: int

  def model(self) -> nn.Module:
    """The captioner, nothing initialised."""
    model = make_model(
      'captioner',
      size=self.size,
      image_size=self.image_size,
      vocab_size=self.vocab,
      dtype=self.dtype,
    )
    return model.clone(depth=self.depth)


class Inputs(NamedTuple):
  """The arguments of every program: nothing of them is a constant that XLA could fold.

  Attributes:
    variables: of the model, at their initial values.
    batch: {'image' (B, H, W, 3), normal; 'tokens' (B, L), uniform, none of them padding}.
    mask: (B,) all True.
  """

  variables: PyTree
  batch: dict[str, jax.Array]
  mask: jax.Array


def make_case(*, size: str, depth: int | None, **rest) -> Case:
  """A Case whose depth, if None, is the size's own.

  Raises:
    UserError: naming the option, if there is no such model.
  """
  if depth is None and size in SIZES:
    depth = SIZES[size].depth
  case = Case(size=size, depth=depth, **rest)
  try:
    case.model()
  except UserError as e:
    raise UserError(f'--{e}') from e
  return case


def make_inputs(case: Case) -> Inputs:
  """Random inputs, the same for all strategies and every run."""

  @jax.jit
  def make():
    init_key, image_key, token_key = jax.random.split(jax.random.key(0), 3)
    shape = (case.batch, case.image_size, case.image_size, 3)
    batch = {
      'image': jax.random.normal(image_key, shape),
      'tokens': jax.random.randint(token_key, (case.batch, case.text_length), 1, case.vocab),
    }
    first = jax.tree.map(lambda x: x[0], batch)
    variables = case.model().init(init_key, first['image'], first['tokens'])
    return Inputs(variables, batch, jnp.ones(case.batch, bool))

  return make()


def make_step(case: Case, strategy: str, clip_norm: float) -> Callable[..., PyTree]:
  """The step of `strategy` as a function of the fields of Inputs, to be compiled.

  Returns gradients and losses; a private one the norms as well.
  """
  model = case.model()

  def example_loss(frozen):
    def loss_fn(params, example):
      variables = {'params': params, 'frozen': frozen}
      return model.apply(variables, example['image'], example['tokens'])

    return loss_fn

  def plain(variables, batch, mask):
    del mask

    def mean_loss(params):
      losses = jax.vmap(example_loss(variables['frozen']), (None, 0))(params, batch)
      return jnp.mean(losses), losses

    return jax.grad(mean_loss, has_aux=True)(variables['params'])

  def private(variables, batch, mask):
    return clipped_sum(
      example_loss(variables['frozen']),
      variables['params'],
      batch,
      mask,
      clip_norm=clip_norm,
      strategy=strategy,
    )

  return plain if strategy == PLAIN else private


def make_matmul(dtype: str) -> tuple[jax.Array, jax.Array]:
  """The factors of the matrix product that shows what this machine can do in `dtype`."""
  side = _MATMUL_SIDE.get(jax.default_backend(), _MATMUL_SIDE_ELSEWHERE)
  keys = jax.random.split(jax.random.key(1))
  return tuple(jax.random.normal(key, (side, side), dtype) for key in keys)
