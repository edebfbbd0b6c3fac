"""A site that takes norms, or a weighted sum, in its own backward pass.

`ghost_site(site)` is the site's equation with one more input and one more output,

    (x, w, norm_slot) -> (y, order)        for one example, to be mapped over a batch,

because a backward pass is given things only as the gradients of outputs, and gives things back only
as the gradients of inputs. Both are zeros that nothing is computed from. The gradient of `order`
says what to do, the same for all examples of a batch:

| gradient of `order`  | gradient of `w`                     | gradient of `norm_slot`      |
| -------------------- | ----------------------------------- | ---------------------------- |
| TAKE_NORMS, negative | zeros                               | SquaredNorm of the example's |
|                      |                                     | gradient of `w`              |
| the example's factor | the sum over the batch of examples' | zeros                        |
|                      | gradients times their factors       |                              |

Only the one of the two that is asked for is computed. The gradient of `x` is what it always is.
Where many sites share a `norm_slot`, autodiff adds up their squares.

Autodiff sees one example at a time and this backward pass needs the batch: a function with a
batching rule of its own (`custom_vmap`) hands the batch to one with a backward pass of its own
(`custom_vjp`).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.privacy.clipping.contributions import repeated
from dpcap.privacy.clipping.kept_sites import keep_sites
from dpcap.privacy.clipping.norms import SquaredNorm
from dpcap.privacy.clipping.rounding import gamma, sum_of_squares, tree_depth
from dpcap.privacy.clipping.sites import Site
from dpcap.privacy.clipping.views import View

# In place of factors, which are not negative.
TAKE_NORMS = -1.0


def ghost_site(site: Site) -> Callable:
  """The site's equation (x, w, norm_slot) -> (y, order); see the module docstring.

  Args:
    site: whose loops, if any, all are around this equation: it is applied once in each iteration.
  """
  site = site._replace(view=View(site.view.leaf))
  leaf = site.view.leaf

  @jax.custom_vjp
  def on_batch(x_B, w, norm_slot_B):
    del norm_slot_B
    return jax.vmap(site.apply, (0, None))(x_B, w), jnp.zeros(x_B.shape[0], w.dtype)

  def forward(x_B, w, norm_slot_B):
    return on_batch(x_B, w, norm_slot_B), (x_B, w, norm_slot_B)

  def backward(kept, gradients):
    (x_B, w, norm_slot_B), (g_B, order_B) = kept, gradients
    dx_B = _gradient_of_input(site, x_B, w, g_B)
    # Outside of the branches: norm and sum are of the same numbers.
    sites = keep_sites([(site,)], {site.path: x_B}, {site.path: g_B}, {}, order_B)

    def take_norms():
      (norm,) = [*sites.squared_norms(), *map(_of_formed, sites.formed_gradients())]
      norm = jax.tree.map(lambda new, slot: new.astype(slot.dtype), norm, norm_slot_B)
      return jnp.zeros_like(w), norm

    def take_sum():
      dw = sites.weighted_sums(order_B, {leaf: w})[leaf]
      return dw.astype(w.dtype), jax.tree.map(jnp.zeros_like, norm_slot_B)

    return dx_B, *jax.lax.cond(order_B[0] < 0, take_norms, take_sum)

  on_batch.defvjp(forward, backward)

  @jax.custom_batching.custom_vmap
  def on_one(x, w, norm_slot):
    del norm_slot
    return site.apply(x, w), jnp.zeros((), w.dtype)

  @on_one.def_vmap
  def batched(axis_size, in_batched, x, w, norm_slot):
    if not in_batched[0]:
      x = repeated(x, axis_size)
    return on_batch(x, w, norm_slot), (True, True)

  return on_one


def with_additions(total: SquaredNorm, sites: Sequence[Site]) -> SquaredNorm:
  """What autodiff added up of these sites, with the rounding of its additions.

  It adds in an order of its own: the squares of a body and, one by one, those of iterations.
  """
  iterations = [sum(loop.length for loop in site.view.loops) for site in sites]
  added = gamma(len(sites) + max(iterations, default=0), jnp.float32)
  return SquaredNorm(
    total.value,
    total.error + added * (jnp.abs(total.value) + total.error),
    total.rounding * (1 + added),
    total.flushed * (1 + added),
  )


def _gradient_of_input(site: Site, x_B: jax.Array, w: jax.Array, g_B: jax.Array) -> jax.Array:
  if not jnp.issubdtype(x_B.dtype, jnp.floating):
    return np.zeros(x_B.shape, jax.dtypes.float0)
  return jax.vjp(lambda x_B: jax.vmap(site.apply, (0, None))(x_B, w), x_B)[1](g_B)[0]


def _of_formed(grads_B: jax.Array) -> SquaredNorm:
  """Of per-example gradients that are summed as they are."""
  squares = sum_of_squares(grads_B)
  error = gamma(1 + tree_depth(grads_B[0].size), squares.dtype) * squares
  return SquaredNorm(squares, error, 0 * squares, 0 * squares)
