"""Per-example gradient clipping (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

A strategy computes, for a batch of examples,

    sum over examples i of  min(1, C / |g_i|) * g_i,      g_i = gradient of loss_i

and nothing else leaves it but per-example norms and losses (diagnostics, outside
the guarantee). The loss is given for ONE example, so no forward pass can mix two.

Formal guarantee of every strategy: replacing one example by nothing (its mask set
to False) takes a term of L2 norm at most C (1 + ROUNDING_MARGIN) over all parameters out
of `ClippedSum.sum`, for any loss function, batch, padding and parameter dtype. Terms are
added in float32, whose rounding is relative to the sum, not to C. Edge cases:

| example's gradient                       | its contribution               |
| ---------------------------------------- | ------------------------------ |
| norm <= C                                | the gradient, as it is         |
| norm > C                                 | the gradient, scaled to norm C |
| NaN or inf anywhere, or a norm past the  | exactly zero, to every         |
| largest float (about 1.8e19 in float32)  | parameter                      |
| masked out (padding, undecodable record) | exactly zero                   |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# Norms, factors and sums are rounded to float32; what is really summed may exceed
# clip_norm by this fraction. Tests hold every strategy to it.
ROUNDING_MARGIN = 1e-5

# Squares of gradients near a smaller C would vanish in float32, and norms with them.
SMALLEST_CLIP_NORM = 1e-12


class ClippedSum(NamedTuple):
  """What a physical batch adds to the logical batch.

  Attributes:
    sum: like the trained parameters, at least float32: the sum of clipped gradients.
    norms: (B,) gradient norm of each example before clipping; 0 where masked out,
      NaN or inf where the gradient was unusable and contributed zero. Private.
    losses: (B,) loss of each example; 0 where masked out. Private.
  """

  sum: PyTree
  norms: jax.Array
  losses: jax.Array


def clipped_sum(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  mask: jax.Array | None = None,
  *,
  clip_norm: float,
  strategy: str = 'vmap',
) -> ClippedSum:
  """Sum over a batch of per-example gradients, each clipped to L2 norm `clip_norm`.

  Args:
    loss_fn: `loss_fn(params, example) -> scalar`, for one example without batch axis.
    params: the trained parameters; gradients are taken with respect to all of them.
    batch: examples stacked along a leading axis of size B in every leaf.
    mask: (B,) bool; False contributes exactly zero. None: all True.
    clip_norm: C, from SMALLEST_CLIP_NORM to the largest float.
    strategy: a key of CLIPPING_STRATEGIES; all give the same answer.

  Returns:
    A ClippedSum, whose `sum` has the L2 sensitivity stated in the module docstring.

  Raises:
    ValueError: if clip_norm is out of range, or the strategy is unknown.
  """
  if not SMALLEST_CLIP_NORM <= clip_norm < float('inf'):
    raise ValueError(
      f'clip_norm is {clip_norm}; it must be finite and at least {SMALLEST_CLIP_NORM}'
    )
  if strategy not in CLIPPING_STRATEGIES:
    raise ValueError(f'clipping is {strategy!r}; allowed: {", ".join(CLIPPING_STRATEGIES)}')
  if mask is None:
    mask = jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)
  return CLIPPING_STRATEGIES[strategy](loss_fn, params, batch, mask, clip_norm)


def _clip_factors(norms: jax.Array, mask: jax.Array, clip_norm: float) -> jax.Array:
  """(B,) min(1, C / norm), and 0 for masked or unusable examples."""
  factors = jnp.minimum(1.0, clip_norm / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
  return jnp.where(mask & jnp.isfinite(norms), factors, 0.0)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _per_example(x_B: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes (B,) to broadcast over the other axes of `like` (B, ...)."""
  return x_B.reshape(x_B.shape + (1,) * (like.ndim - 1))


def _vmap(loss_fn, params, batch, mask, clip_norm) -> ClippedSum:
  """The definition of right: every example's whole gradient, by jax.vmap of jax.grad."""
  losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))(params, batch)
  grads = jax.tree.map(_at_least_float32, grads)
  squares = [jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)]
  norms = jnp.sqrt(functools.reduce(jnp.add, squares))
  factors = _clip_factors(norms, mask, clip_norm)

  def weighted_sum(g):
    # 0 x NaN is NaN: a zero factor does not silence an unusable gradient, `where` does.
    g = jnp.where(_per_example(factors > 0, g), g, 0.0)
    return jnp.sum(g * _per_example(factors, g), axis=0)

  return ClippedSum(
    sum=jax.tree.map(weighted_sum, grads),
    norms=jnp.where(mask, norms, 0.0),
    losses=jnp.where(mask, losses, 0.0),
  )


CLIPPING_STRATEGIES = {'vmap': _vmap}


def plain_sum(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  mask: jax.Array | None = None,
) -> ClippedSum:
  """Sum over a batch of gradients, NOT clipped: unbounded sensitivity, no guarantee.

  The non-private counterpart of `clipped_sum`, by one batched backward pass, for runs
  with epsilon = infinity. Same arguments. A batch whose summed gradient is not finite
  contributes zero as a whole. `norms` are NaN: they are not computed.
  """
  if mask is None:
    mask = jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)

  # A masked example may hold anything, and the zero cotangent of `where` does not silence
  # a NaN: an example that counts stands in for it.
  stand_in = jnp.where(mask, jnp.arange(mask.shape[0]), jnp.argmax(mask))
  used = jax.tree.map(lambda x: jnp.asarray(x)[stand_in], batch)

  def total_loss(params):
    losses = jax.vmap(loss_fn, (None, 0))(params, used)
    losses = jnp.where(mask, losses, 0.0)
    return jnp.sum(losses), losses

  grads, losses = jax.grad(total_loss, has_aux=True)(params)
  grads = jax.tree.map(_at_least_float32, grads)
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
  return ClippedSum(
    sum=jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads),
    norms=jnp.full(mask.shape, jnp.nan),
    losses=losses,
  )
