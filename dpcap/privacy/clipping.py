"""Per-example gradient clipping (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

A strategy computes, for a batch of examples,

    sum over examples i of  factor(|g_i|) * g_i,      g_i = gradient of loss_i,

with factor(norm) = min(1, C / norm) or another clip function, and nothing else leaves it
but per-example norms, factors and losses (diagnostics, outside the guarantee). The loss is
given for ONE example, so no forward pass can mix two; an example may hold several views,
which then are one unit.

Formal guarantee of every strategy: replacing one example by nothing (its mask set
to False) takes a term of L2 norm at most C (1 + ROUNDING_MARGIN) over all parameters out
of `ClippedSum.sum`, for any loss function, batch, padding and parameter dtype. Terms are
added in float32, whose rounding is relative to the sum, not to C. Edge cases:

| example's gradient                       | its contribution, by `Clip`    |
| ---------------------------------------- | ------------------------------ |
| norm <= C                                | the gradient, as it is         |
| norm > C                                 | the gradient, scaled to norm C |
| NaN or inf anywhere, or a norm past the  | exactly zero, to every         |
| largest float (about 1.8e19 in float32)  | parameter                      |
| masked out (padding, undecodable record) | exactly zero                   |

In `bookkeeping` and `ghost` the same goes for the activations and output gradients that
norms are taken from, where they are past 1e19 in float32. Rounding is bounded as it comes out
in products of ordinary data; an adversary who chose each mantissa could gain more than
the margin in products over several thousand inputs or tens of thousands of tokens, where a
sum may at worst be off by its length times the unit roundoff, as in `vmap` too.

Inside `jax.shard_map` these two need `check_vma=False`: the loss is traced before it is known to
vary over devices.

Strategies, cost in floating-point operations where a plain training step has 3:

| strategy      | backward passes     | per-example gradients held     | operations    |
| ------------- | ------------------- | ------------------------------ | ------------- |
| `vmap`        | 1                   | of all parameters              | 3, in memory  |
| `bookkeeping` | 1, keeps activations and output gradients of all layers | of biases, scales | about 3.3 |
| `ghost`       | 2                   | of biases, scales              | about 4.3     |
| `auto`        | `bookkeeping`, or `ghost` where the loss uses remat: it is short of memory          |

`vmap` is the definition of right, in a dozen lines. The others never form the gradients of
matrices, convolutions and embeddings: see `uses.py` and `factored.py`. What they lose to
rounding, where norms come from Gram matrices or products have less than float32, is
bounded and added to the norms that factors are computed from, so that the guarantee holds
for what is really summed. `ghost` runs the same backward pass twice, from the same
cotangents, and weighs at the sites: weighing the loss instead would round differently.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.privacy import factored
from dpcap.privacy.clip_functions import Clip, ClipFunction
from dpcap.privacy.factored import at_least_float32
from dpcap.privacy.replay import replay
from dpcap.privacy.uses import FLOATS, Path, Site, find_uses

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
    factors: (B,) what each gradient was scaled by; 0 where masked out or unusable. Private.
    losses: (B,) loss of each example; 0 where masked out. Private.
  """

  sum: PyTree
  norms: jax.Array
  factors: jax.Array
  losses: jax.Array


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
      16, 32 or 64 bit float, or mask and batch are not (B,) bool and (B, ...).
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
  factors = lambda norms: clip_function(norms, clip_norm)
  if strategy == 'auto':
    strategy = choose_strategy(loss_fn, params, batch)
  return CLIPPING_STRATEGIES[strategy](loss_fn, params, batch, mask, factors)


def choose_strategy(loss_fn: LossFn, params: PyTree, batch: PyTree) -> str:
  """What 'auto' stands for with this loss; arrays or their shapes will do."""
  return 'ghost' if _find_uses(loss_fn, params, batch).remat else 'bookkeeping'


def _vmap(loss_fn, params, batch, mask, factor_of) -> ClippedSum:
  """The definition of right: every example's whole gradient, by jax.vmap of jax.grad."""
  losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, 0))(params, batch)
  grads = jax.tree.map(at_least_float32, grads)
  norms = jnp.sqrt(_squares(jax.tree.leaves(grads)))
  factors = jnp.where(mask & jnp.isfinite(norms), factor_of(norms), 0.0)

  def weighted_sum(g):
    # 0 x NaN is NaN: a zero factor does not silence an unusable gradient, `where` does.
    return _weighted(factors, jnp.where(_per_example(factors > 0, g), g, 0.0))

  return ClippedSum(
    sum=jax.tree.map(weighted_sum, grads),
    norms=jnp.where(mask, norms, 0.0),
    factors=factors,
    losses=jnp.where(mask, losses, 0.0),
  )


def _bookkeeping(loss_fn, params, batch, mask, factor_of) -> ClippedSum:
  """One backward pass that keeps what each site was fed and its output's gradients.

  Source: Bu et al. 2022, arXiv 2210.00038, algorithm 1.
  """
  uses = _find_uses(loss_fn, params, batch)
  leaves, treedef = jax.tree.flatten(params)

  def attempt(batch, mask) -> ClippedSum:
    size = mask.shape[0]

    def at_site(site, x, w, slot):
      return _tap(site.apply(x, w), slot), x

    def loss_of_one(direct, slots, example):
      mixed = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
      return replay(uses, mixed, example, slots, at_site)

    axes = _batch_axes(uses.sites)
    losses_of = jax.vmap(loss_of_one, (0, axes, 0), (0, axes))
    direct = {i: _repeat(leaves[i], size) for i in uses.direct}
    slots = {at: _slot(site, size) for at, site in uses.sites.items()}
    losses, backward, xs = jax.vjp(
      lambda direct, slots: losses_of(direct, slots, batch), direct, slots, has_aux=True
    )
    direct_grads, gs = backward(jnp.ones_like(losses))
    xs, gs = factored.settled(xs), factored.settled(gs)

    norms, bounds = _norms(uses, xs, gs, direct_grads)
    factors = jnp.where(mask, factor_of(bounds), 0.0)
    sums = {i: _weighted(factors, grads) for i, grads in direct_grads.items()}
    for at, site in uses.sites.items():
      i = site.view.leaf
      term = factored.weighted_sum(site, xs[at], gs[at], factors, leaves[i])
      sums[i] = sums[i] + term if i in sums else term
    return ClippedSum(_unflatten(treedef, leaves, sums), norms, factors, losses)

  return _without_unusable(attempt, batch, mask)


def _ghost(loss_fn, params, batch, mask, factor_of) -> ClippedSum:
  """One backward pass for the norms, and one for the sum, weighted by the factors.

  Norms are taken inside the backward pass, so that nothing is kept beyond what it needs
  itself, remat included; but for parameters used several times, which need all their uses
  at once. Source: Li et al. 2021, arXiv 2110.05679, section 4.
  """
  uses = _find_uses(loss_fn, params, batch)
  leaves, treedef = jax.tree.flatten(params)
  # A site alone, whose loops all slice its parameter, overlaps with nothing else.
  alone = {
    group[0].path
    for group in uses.groups
    if len(group) == 1 and all(loop.sliced for loop in group[0].view.loops)
  }
  kept = {at: site for at, site in uses.sites.items() if at not in alone}
  dtype = functools.reduce(jnp.promote_types, map(jnp.result_type, leaves), jnp.float32)

  def attempt(batch, mask) -> ClippedSum:
    size = mask.shape[0]

    def loss_of_one(shared, direct, slots, norm, example):
      def at_site(site, x, w, slot):
        if site.path in alone:
          y, weight = _observed(site)(x, w, norm)
          return y, (weight, None)
        y, weight = _observed(site)(x, w, None)
        return _tap(y, slot), (weight, x)

      mixed = [shared[i] if i in shared else direct[i] for i in range(len(leaves))]
      return replay(uses, mixed, example, slots, at_site)

    in_axes = (None, 0, _batch_axes(kept), 0, 0)
    losses_of = jax.vmap(loss_of_one, in_axes, (0, _batch_axes(uses.sites)))

    def forward(*taken):
      losses, records = losses_of(*taken, batch)
      weights = {at: weight for at, (weight, _) in records.items()}
      return (losses, weights), {at: records[at][1] for at in kept}

    (losses, weights), backward, xs = jax.vjp(
      forward,
      # In float32, and cast where they are used: so are their gradients.
      {i: at_least_float32(leaf) for i, leaf in enumerate(leaves) if i not in uses.direct},
      {i: _repeat(leaves[i], size) for i in uses.direct},
      {at: _slot(site, size) for at, site in kept.items()},
      [jnp.zeros(size, dtype) for _ in factored.SquaredNorm._fields],
      has_aux=True,
    )
    _, direct_grads, gs, alone_norms = backward((jnp.ones_like(losses), weights))
    xs, gs = factored.settled(xs), factored.settled(gs)
    norms, bounds = _norms(uses, xs, gs, direct_grads, factored.SquaredNorm(*alone_norms))
    factors = jnp.where(mask, factor_of(bounds), 0.0)
    # All ones again: the same gradients, which sites then weigh. That they depend on factors
    # keeps XLA from merging the passes, which would keep all gradients as bookkeeping does.
    seeds = jnp.where(factors >= 0, jnp.ones_like(losses), 0)
    weights = jax.tree.map(lambda w: jnp.broadcast_to(factors, w.shape).astype(w.dtype), weights)
    sums = backward((seeds, weights))[0]
    sums |= {i: _weighted(factors, grads) for i, grads in direct_grads.items()}
    return ClippedSum(_unflatten(treedef, leaves, sums), norms, factors, losses)

  return _without_unusable(attempt, batch, mask)


CLIPPING_STRATEGIES = {'bookkeeping': _bookkeeping, 'ghost': _ghost, 'vmap': _vmap}


def _find_uses(loss_fn, params, batch):
  struct = lambda x, first: jax.ShapeDtypeStruct(jnp.shape(x)[first:], jnp.result_type(x))
  return find_uses(
    loss_fn,
    jax.tree.map(lambda x: struct(x, 0), params),
    jax.tree.map(lambda x: struct(x, 1), batch),
  )


@jax.custom_vjp
def _tap(y: jax.Array, slot: jax.Array) -> jax.Array:
  """`y`; its gradient comes out as the gradient of `slot` too."""
  del slot
  return y


_tap.defvjp(lambda y, slot: (y, None), lambda _, g: (g, g))


def _observed(site: Site) -> Callable:
  """The site's equation (x, w, norm) -> (y, weight) on one example, to be mapped over a batch.

  Its backward pass does what autodiff would not:
  - the gradient of `norm`, a list as SquaredNorm or None, is the squared norm of that of `w`;
  - the gradient of `w` is summed with each example weighted by the gradient of the output
    `weight` (itself 0), and in at least float32.
  """
  site = site._replace(view=site.view._replace(loops=()))  # here all scans are outside

  @jax.custom_vjp
  def on_batch(x_B, w, norm_B):
    del norm_B
    return jax.vmap(site.apply, (0, None))(x_B, w), jnp.zeros(x_B.shape[0], w.dtype)

  def forward(x_B, w, norm_B):
    return on_batch(x_B, w, norm_B), (x_B, w, norm_B)

  def backward(kept, gradients):
    (x_B, w, norm_B), (g_B, weights_B) = kept, gradients
    if jnp.issubdtype(x_B.dtype, jnp.floating):
      (dx_B,) = jax.vjp(lambda x_B: jax.vmap(site.apply, (0, None))(x_B, w), x_B)[1](g_B)
    else:
      dx_B = np.zeros(x_B.shape, jax.dtypes.float0)
    x_B, g_B = factored.settled((x_B, g_B))
    dw = factored.weighted_view(site, x_B, g_B, weights_B).astype(w.dtype)
    if norm_B is not None:
      squared = factored.squared_norm([site], [x_B], [g_B])
      norm_B = [of_site.astype(total.dtype) for of_site, total in zip(squared, norm_B)]
    return dx_B, dw, norm_B

  on_batch.defvjp(forward, backward)

  @jax.custom_batching.custom_vmap
  def on_one(x, w, norm):
    del norm
    return site.apply(x, w), jnp.zeros((), w.dtype)

  @on_one.def_vmap
  def batched(axis_size, in_batched, x, w, norm):
    if not in_batched[0]:
      x = _repeat(x, axis_size)
    return on_batch(x, w, norm), (True, True)

  return on_one


def _repeat(x: jax.Array, size: int) -> jax.Array:
  return jnp.broadcast_to(x, (size, *jnp.shape(x)))


def _batch_axes(sites: dict[Path, Site]) -> dict[Path, int]:
  """Of arrays of a site: they carry its loops before the batch."""
  return {at: len(site.view.loops) for at, site in sites.items()}


def _slot(site: Site, size: int) -> jax.Array:
  """Takes up the gradients of a site's output: (loops..., B, ...)."""
  y = site.eqn.outvars[0].aval
  return jnp.zeros([*(loop.length for loop in site.view.loops), size, *y.shape], y.dtype)


def _norms(uses, xs, gs, direct_grads, alone=None) -> tuple[jax.Array, jax.Array]:
  """(B,) gradient norms, and what they are at most, rounding of sums included.

  Neither is finite where the other is not.
  """
  parts = [
    factored.squared_norm(group, [xs[s.path] for s in group], [gs[s.path] for s in group])
    for group in uses.groups
    if all(s.path in xs for s in group)
  ]
  if alone is not None:
    parts.append(alone)
  squares = _squares(direct_grads.values())
  if not parts:
    return jnp.sqrt(squares), jnp.sqrt(squares)
  value, lost, rounding = (functools.reduce(jnp.add, terms) for terms in zip(*parts))
  # A sum of Gram products may fall below zero by rounding.
  value = jnp.maximum(value, 0) + squares
  bounds = jnp.sqrt(value + lost) + jnp.sqrt(rounding)
  return jnp.where(jnp.isfinite(bounds), jnp.sqrt(value), bounds), bounds


def _squares(leaves) -> jax.Array:
  """(B,) sums of squares over all leaves (B, ...), in at least float32."""
  squares = lambda g: jnp.sum(jnp.square(at_least_float32(g)), axis=tuple(range(1, g.ndim)))
  return functools.reduce(jnp.add, map(squares, leaves), jnp.zeros(()))


def _weighted(factors_B: jax.Array, grads_B: jax.Array) -> jax.Array:
  return jnp.einsum('b,b...->...', factors_B, at_least_float32(grads_B), precision='highest')


def _per_example(x_B: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes (B,) to broadcast over the other axes of `like` (B, ...)."""
  return x_B.reshape(x_B.shape + (1,) * (like.ndim - 1))


def _unflatten(treedef, leaves, sums: dict[int, jax.Array]) -> PyTree:
  """The parameters' tree of sums; zeros for parameters without a gradient."""
  zeros = lambda leaf: jnp.zeros_like(at_least_float32(jnp.asarray(leaf)))
  return treedef.unflatten([sums[i] if i in sums else zeros(x) for i, x in enumerate(leaves)])


def _stand_in(batch: PyTree, mask: jax.Array) -> PyTree:
  """The batch with the first example that counts in place of all that do not.

  A masked example may hold anything, and a zero weight does not silence a NaN.
  """
  stand_in = jnp.where(mask, jnp.arange(mask.shape[0]), jnp.argmax(mask))
  return jax.tree.map(lambda x: x[stand_in], batch)


def _without_unusable(attempt, batch: PyTree, mask: jax.Array) -> ClippedSum:
  """`attempt(batch, mask)`, again without the examples whose gradient proves unusable.

  So they contribute exactly zero, and what they hold touches nothing else: to sum with
  them, even at weight zero, would spread their NaNs. Every further attempt is rare and
  masks at least one example more.
  """

  def try_once(state):
    result, mask, _ = state
    out = attempt(_stand_in(batch, mask), mask)
    usable = mask & jnp.isfinite(out.norms)
    first = lambda new, old: jnp.where(mask, new, old)
    result = ClippedSum(
      # Where no example is left, the stand-in may be anything.
      sum=jax.tree.map(lambda x: jnp.where(jnp.any(usable), x, 0), out.sum),
      norms=first(out.norms, result.norms),
      factors=jnp.where(usable, out.factors, 0),
      losses=first(out.losses, result.losses),
    )
    return result, usable, jnp.any(usable != mask)

  shapes = jax.eval_shape(attempt, batch, mask)
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  state = (nothing, mask, jnp.array(True))
  return jax.lax.while_loop(lambda state: state[2], try_once, state)[0]


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
  batch = jax.tree.map(jnp.asarray, batch)
  mask = _checked_mask(mask, batch)
  used = _stand_in(batch, mask)

  def total_loss(params):
    losses = jax.vmap(loss_fn, (None, 0))(params, used)
    losses = jnp.where(mask, losses, 0.0)
    return jnp.sum(losses), losses

  grads, losses = jax.grad(total_loss, has_aux=True)(params)
  grads = jax.tree.map(at_least_float32, grads)
  finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
  return ClippedSum(
    sum=jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads),
    norms=jnp.full(mask.shape, jnp.nan),
    factors=jnp.where(mask, 1.0, 0.0),
    losses=losses,
  )
