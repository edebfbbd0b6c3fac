"""Per-example gradient clipping (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

A strategy computes, for a batch of examples,

    sum over examples i of  factor(|g_i|) * g_i,      g_i = gradient of loss_i,

with factor(norm) = min(1, C / norm) or another clip function, and nothing else leaves it
but per-example norms, factors and losses (diagnostics, outside the guarantee). The loss is
given for ONE example, so no forward pass can mix two; an example may hold several views,
which then are one unit. A loss that could look past its example is refused (`tracing.py`).

Formal guarantee of every strategy: replacing one example by nothing (its mask set
to False) takes a term of L2 norm at most C (1 + ROUNDING_MARGIN) over all parameters out
of `ClippedSum.sum`, for any loss function, ANY example, batch, padding and parameter dtype, in the
arithmetic of `rounding.py`. Terms are added in float32, whose rounding is relative to the sum,
not to C. Edge cases:

| example's gradient                       | its contribution, by `Clip`    |
| ---------------------------------------- | ------------------------------ |
| norm <= C                                | the gradient, as it is         |
| norm > C                                 | the gradient, scaled to norm C |
| NaN or inf anywhere, or a norm past the  | exactly zero, to every         |
| largest float (about 1.8e19 in float32)  | parameter                      |
| masked out (padding, undecodable record) | exactly zero                   |

Nothing is scaled up by more than LARGEST_FACTOR, whatever the clip function says. In `bookkeeping` and `ghost` the same goes for the activations and output gradients that
norms are taken from, where they are past 1e19 in float32.

Why it holds. Whatever is formed for each example (all of it in `vmap`) is held, and norm and sum
are of the same numbers; the norm is a sum of squares in a known order. What is not formed has a norm
with a proven bound on its rounding and on the rounding of its sum (`norms.py`), which is
added to the norm that factors are computed from. Ordinary gradients lose one to a few 1e-5 of their
factor to it. An example whose tokens cancel, so that its gradient is small beside its parts, loses
more. `ghost` runs one compiled backward pass twice, so that both see the same gradients.

Strategies, cost in floating-point operations where a plain training step has 3:

| strategy      | backward passes     | per-example gradients held     | operations    |
| ------------- | ------------------- | ------------------------------ | ------------- |
| `vmap`        | 1                   | of all parameters              | 3, in memory  |
| `bookkeeping` | 1, keeps activations and output gradients of all layers | where smaller than these | about 3.3 |
| `ghost`       | 2                   | of biases, scales              | about 4.3     |
| `auto`        | `bookkeeping`, or `ghost` where the loss uses remat: it is short of memory          |

`vmap` is the definition of right, in a dozen lines. How the others go without the gradients of
matrices, convolutions and embeddings, to be read in this order: `uses.py` finds where a
parameter meets examples, `replay.py` runs the loss with a hand on these sites, `outer_products.py`
says what a site adds to the gradient, `norms.py` its norm, and `bookkeeping.py` and `ghost.py` put
these together.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.bookkeeping import bookkeeping
from dpcap.privacy.clipping.clip_functions import Clip, ClipFunction
from dpcap.privacy.clipping.computed_once import settled
from dpcap.privacy.clipping.contributions import ClippedSum, stand_in, weighted, without_unusable
from dpcap.privacy.clipping.ghost import ghost
from dpcap.privacy.clipping.kept_sites import factor_norms
from dpcap.privacy.clipping.rounding import at_least_float32
from dpcap.privacy.clipping.tracing import trace_loss
from dpcap.privacy.clipping.uses import FLOATS, find_uses

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

# Norms, factors and sums are rounded to float32; what is really summed may exceed
# clip_norm by this fraction. Tests hold every strategy to it.
ROUNDING_MARGIN = 1e-5

# Squares of gradients near a smaller C would vanish in float32, and norms with them.
SMALLEST_CLIP_NORM = 1e-12

# With a larger one, activations that norms can be taken from would overflow when weighed.
LARGEST_FACTOR = 1e18


class Strategy(Protocol):
  """How a clipped sum is computed."""

  def __call__(
    self,
    loss_fn: LossFn,
    jaxpr: jax.extend.core.ClosedJaxpr,
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    factor_of: Callable[[jax.Array, jax.Array], jax.Array],
  ) -> ClippedSum:
    """The clipped sum over `batch`.

    Args:
      loss_fn: of one example.
      jaxpr: its trace.
      params: the trained parameters.
      batch: one example or more.
      mask: (B,) bool.
      factor_of: from norms (B,), and what is added to the weighted gradients whatever the
        weight (B,), to factors (B,).
    """


def clipped_sum(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  mask: jax.Array | None = None,
  *,
  clip_norm: float,
  clip_function: ClipFunction = Clip(),
  strategy: str = 'auto',
) -> ClippedSum:
  """Sum over a batch of per-example gradients, each clipped to L2 norm `clip_norm`.

  Works on any loss function of JAX. Where a parameter is used in a way that only vmap can
  clip, that parameter is, with a ClippingFallbackWarning that names it.

  Args:
    loss_fn: `loss_fn(params, example) -> scalar`, for one example without batch axis.
    params: the trained parameters; gradients are taken with respect to all of them.
    batch: examples stacked along a leading axis of size B in every leaf.
    mask: (B,) bool; False contributes exactly zero. None: all True.
    clip_norm: C, from SMALLEST_CLIP_NORM to the largest float.
    clip_function: from norms to factors; see `clip_functions.py`.
    strategy: 'auto' or a key of CLIPPING_STRATEGIES; all give the same answer.

  Returns:
    A ClippedSum, whose `sum` has the L2 sensitivity stated in the module docstring.

  Raises:
    ValueError: if clip_norm is out of range, the strategy is unknown, a parameter is no
      16, 32 or 64 bit float, mask and batch are not (B,) bool and (B, ...), or it is called inside
      shard_map with check_vma=True.
    MixedExamplesError: if the loss could see other examples than its own.
  """
  if not SMALLEST_CLIP_NORM <= clip_norm < float('inf'):
    raise ValueError(
      f'clip_norm is {clip_norm}; it must be finite and at least {SMALLEST_CLIP_NORM}'
    )
  if strategy not in ('auto', *CLIPPING_STRATEGIES):
    raise ValueError(f'clipping is {strategy!r}; allowed: auto, {", ".join(CLIPPING_STRATEGIES)}')
  batch = jax.tree.map(jnp.asarray, batch)
  mask = _checked_mask(mask, batch)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if jnp.result_type(leaf) not in FLOATS:
      raise ValueError(
        f'parameter {jax.tree_util.keystr(path, simple=True, separator="/")} is'
        f' {jnp.result_type(leaf)}; allowed: {", ".join(map(str, FLOATS))}'
      )
  jaxpr = trace_loss(loss_fn, params, batch)
  if not mask.size:
    zeros = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(jnp.asarray(p))), params)
    return ClippedSum(zeros, *(jnp.zeros(0) for _ in range(3)))
  if strategy == 'auto':
    strategy = _choice(find_uses(jaxpr, params, warn=False))

  def factor_of(norms, flushed):
    # What is flushed adds to a weighted gradient of norm C, whatever its weight: make room for it.
    factors = clip_function(norms, clip_norm) * jnp.maximum(1 - flushed / clip_norm, 0)
    return jnp.minimum(factors, LARGEST_FACTOR)

  return CLIPPING_STRATEGIES[strategy](loss_fn, jaxpr, params, batch, mask, factor_of)


def choose_strategy(loss_fn: LossFn, params: PyTree, batch: PyTree) -> str:
  """What 'auto' stands for with this loss; arrays or their shapes will do."""
  return _choice(find_uses(trace_loss(loss_fn, params, batch), params, warn=False))


def _choice(uses) -> str:
  return 'ghost' if uses.remat else 'bookkeeping'


def _vmap(loss_fn, jaxpr, params, batch, mask, factor_of) -> ClippedSum:
  """The definition of right: every example's whole gradient, by jax.vmap of jax.grad."""
  del jaxpr
  losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))(params, batch)
  # Norm and sum are of the same numbers. Of a loss that is constant the gradient need not be.
  grads = jax.tree.map(at_least_float32, grads)
  grads = settled(grads, (grads, losses))
  norms, *bounds = factor_norms(mask.size, jax.tree.leaves(grads), [])
  factors = jnp.where(mask & jnp.isfinite(norms), factor_of(*bounds), 0.0)

  def weighted_sum(g):
    # 0 x NaN is NaN: a zero factor does not silence an unusable gradient, `where` does.
    return weighted(factors, jnp.where(_per_example(factors > 0, g), g, 0.0))

  return ClippedSum(
    sum=jax.tree.map(weighted_sum, grads),
    norms=jnp.where(mask, norms, 0.0),
    factors=factors,
    losses=jnp.where(mask, losses, 0.0),
  )


CLIPPING_STRATEGIES: dict[str, Strategy] = {
  'bookkeeping': bookkeeping,
  'ghost': ghost,
  'vmap': _vmap,
}


def plain_sum(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  mask: jax.Array | None = None,
) -> ClippedSum:
  """Sum over a batch of gradients, NOT clipped: unbounded sensitivity, no guarantee.

  The non-private counterpart of `clipped_sum`, by one batched backward pass, for runs
  with epsilon = infinity. Same arguments. An example whose gradient is not finite contributes
  zero, and its factor is 0; so does a batch whose sum alone overflows. `norms` are NaN: they
  are not computed.
  """
  batch = jax.tree.map(jnp.asarray, batch)
  mask = _checked_mask(mask, batch)
  trace_loss(loss_fn, params, batch)

  def attempt(batch, mask) -> ClippedSum:
    def total_loss(params):
      losses = jax.vmap(loss_fn, (None, 0))(params, batch)
      return jnp.sum(jnp.where(mask, losses, 0.0)), losses

    grads, losses = jax.grad(total_loss, has_aux=True)(params)
    grads = jax.tree.map(at_least_float32, grads)

    def look_at_each(_):
      one = lambda example: _is_finite(jax.grad(loss_fn)(params, example))
      return jax.lax.map(one, batch)

    # Rare, and then one by one.
    finite = _is_finite(grads)
    usable = jax.lax.cond(finite, lambda _: jnp.ones(mask.shape, bool), look_at_each, None)
    return ClippedSum(
      # Where each is finite and the sum is not, it is zero.
      sum=jax.tree.map(lambda g: jnp.where(finite, g, 0), grads),
      norms=jnp.where(usable, 0.0, jnp.nan),
      factors=jnp.where(mask, 1.0, 0.0),
      losses=losses,
    )

  result = without_unusable(attempt, batch, mask) if mask.size else attempt(batch, mask)
  return result._replace(norms=jnp.full(mask.shape, jnp.nan))


def _is_finite(tree: PyTree) -> jax.Array:
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, finite, jnp.array(True))


def _per_example(x_B: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes (B,) to broadcast over the other axes of `like` (B, ...)."""
  return x_B.reshape(x_B.shape + (1,) * (like.ndim - 1))


def _checked_mask(mask, batch: PyTree) -> jax.Array:
  """`mask`, or all True; refuses one that does not fit the batch, where JAX would not."""
  sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(f'batch has leading axes {sorted(sizes)}; all leaves need the same one')
  (shape,) = sizes
  mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
  if (mask.shape, mask.dtype) != (shape, bool):
    raise ValueError(f'mask is {mask.dtype} {mask.shape}; it must be bool {shape}')
  return mask
