"""Per-example gradient clipping (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

A strategy computes, for a batch of examples,

    sum over examples i of  factor(|g_i|) * g_i,      g_i = gradient of loss_i,

with factor(norm) = min(1, C / norm) or another clip function, and nothing else leaves it
but per-example norms, factors and losses (diagnostics, outside the guarantee). The loss is
given for ONE example, so no forward pass can mix two; an example may hold several views,
which then are one unit. A loss that could look past its example is refused (`tracing.py`).

Formal guarantee of every strategy: replacing one example by nothing (its mask set
to False) takes a term of L2 norm at most C (1 + ROUNDING_MARGIN) over all parameters out
of `ClippedSum.sum` and changes no other, for any loss function, clip function, ANY example, batch,
padding and parameter dtype, in the arithmetic of `rounding.py`. Terms are added in float32, whose
rounding is relative to the sum, not to C. Edge cases:

| example's gradient                       | its contribution, by `Clip`    |
| ---------------------------------------- | ------------------------------ |
| norm <= C                                | the gradient, as it is         |
| norm > C                                 | the gradient, scaled to norm C |
| NaN or inf anywhere, or a norm past the  | exactly zero, to every         |
| largest float (about 1.8e19 in float32)  | parameter                      |
| masked out (padding, undecodable record) | exactly zero                   |

In `bookkeeping` and `ghost` the same goes for the activations and output gradients that norms are
taken from, where they are past 1e19 in float32. Whatever the clip function says, of one norm at a
time, nothing is scaled to a norm above C, nor up by more than LARGEST_FACTOR, and a factor that is
negative or NaN is zero.

Why it holds. Whatever is formed for each example (all of it in `vmap`) is held, and norm and sum
are of the same numbers; the norm is a sum of squares in a known order. What is not formed has a
norm with a proven bound on its rounding and on the rounding of its sum (`norms.py`), which is added
to the norm that factors are computed from. Ordinary gradients lose one to a few 1e-5 of their
factor to it. An example whose tokens cancel, so that its gradient is small beside its parts, loses
more. `ghost` runs one compiled backward pass twice, so that both see the same gradients.

In the end a gradient of weight w adds a term of norm at most w bound + flushed, and nothing at
weight 0 (`gradient_norms.py`). From any factor with factor * bound <= C follows the weight
w = factor * max(1 - flushed / C, 0), and w bound + flushed <= C - flushed + flushed = C.

Strategies, cost in floating-point operations where a plain training step has 3:

| strategy      | backward passes                | per-example gradients held | operations   |
| ------------- | ------------------------------ | -------------------------- | ------------ |
| `vmap`        | 1                              | of all parameters          | 3, in memory |
| `bookkeeping` | 1, keeps activations and       | where smaller than these   | about 3.3    |
|               | output gradients of all layers |                            |              |
| `ghost`       | 2                              | of biases, scales          | about 4.3    |

`auto` is `bookkeeping`, or `ghost` where the loss uses remat: it is short of memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpcap.privacy.clipping.bookkeeping import bookkeeping
from dpcap.privacy.clipping.clip_functions import Clip, ClipFunction
from dpcap.privacy.clipping.contributions import checked_mask
from dpcap.privacy.clipping.ghost import ghost
from dpcap.privacy.clipping.gradient_norms import GradientNorms
from dpcap.privacy.clipping.rounding import FLOATS, at_least_float32
from dpcap.privacy.clipping.strategy import ClippedSum, LossFn, Problem, Strategy
from dpcap.privacy.clipping.tracing import trace_loss
from dpcap.privacy.clipping.uses import find_uses
from dpcap.privacy.clipping.vmap import vmap

PyTree = Any

# Norms, factors and sums are rounded to float32; what is really summed may exceed
# clip_norm by this fraction. Tests hold every strategy to it.
ROUNDING_MARGIN = 1e-5

# Squares of gradients near a smaller C would vanish in float32, and norms with them.
SMALLEST_CLIP_NORM = 1e-12

# With a larger one, activations that norms can be taken from would overflow when weighed.
LARGEST_FACTOR = 1e18


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
    clip_function: from a gradient's norm to its factor; see `clip_functions.py`.
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
  mask = checked_mask(mask, batch)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if jnp.result_type(leaf) not in FLOATS:
      raise ValueError(
        f'parameter {jax.tree_util.keystr(path, simple=True, separator="/")} is'
        f' {jnp.result_type(leaf)}; allowed: {", ".join(map(str, FLOATS))}'
      )
  trace = trace_loss(loss_fn, params, batch)
  if not mask.size:
    zeros = jax.tree.map(lambda p: jnp.zeros_like(at_least_float32(jnp.asarray(p))), params)
    return ClippedSum(zeros, *(jnp.zeros(0) for _ in range(3)))

  def factor_of(norms: GradientNorms) -> jax.Array:
    # Of one norm at a time: no example's factor may depend on another's gradient.
    factors = jax.vmap(lambda norm: clip_function(norm, clip_norm))(norms.bound)
    factors = jnp.minimum(factors, clip_norm / norms.bound)
    # What is flushed adds to a weighted gradient of norm C, whatever its weight: make room for it.
    room = jnp.maximum(1 - norms.flushed / clip_norm, 0)
    factors = jnp.minimum(factors * room, LARGEST_FACTOR)
    return jnp.where(factors > 0, factors, 0)  # of NaN too

  problem = Problem(loss_fn, trace, params, batch, mask, factor_of)
  return CLIPPING_STRATEGIES[_choice(problem.uses) if strategy == 'auto' else strategy](problem)


def choose_strategy(loss_fn: LossFn, params: PyTree, batch: PyTree) -> str:
  """What 'auto' stands for with this loss; arrays or their shapes will do."""
  return _choice(find_uses(trace_loss(loss_fn, params, batch), params, warn=False))


def _choice(uses) -> str:
  return 'ghost' if uses.remat else 'bookkeeping'


CLIPPING_STRATEGIES: dict[str, Strategy] = {
  'bookkeeping': bookkeeping,
  'ghost': ghost,
  'vmap': vmap,
}
