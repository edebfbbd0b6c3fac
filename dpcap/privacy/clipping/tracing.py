"""Traces the loss of one example, and refuses what could see another one.

Clipping bounds what one example does to the sum only if the gradient of an example is a
function of that example alone. A loss is written for one example and mapped over the batch, which
leaves a few ways around it, all of them visible in its trace or, where a rule of its own hides them
(`custom_vjp`, `custom_jvp`), in that of its gradient:

- an axis that the caller named, as flax's BatchNorm with axis_name does: a collective over it
  brings in the examples of other devices;
- a batching rule of somebody's own (`jax.custom_batching.custom_vmap`), which gets the whole batch;
- a call out of JAX (`pure_callback`, `io_callback`, `ffi_call`), unless it is made for one example
  after the other (vmap_method='sequential');
- random bits of keys of `rbg` and `unsafe_rbg`, or of `lax.rng_bit_generator` that these are made
  of: mapped over keys, all are drawn from the first one. `threefry2x32` draws each from its own;
- `lax.rng_uniform`, whose generator all examples share. It draws anew wherever it is computed
  again, so that the second pass of `ghost` would sum other gradients than it has the norms of.

What no trace shows is taken for granted: a function called out of JAX keeps nothing of one example
for the next and gives the same again for the same arguments (the second pass of `ghost` may ask
again), and a primitive of somebody's own has a batching rule that keeps examples apart.
`check_clipping` finds most of what breaks that, by comparing an example in other company.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from dpcap.privacy.clipping import jax_internals

PyTree = Any


class MixedExamplesError(ValueError):
  """The loss of one example could depend on others: clipping would bound nothing."""


def trace_loss(
  loss_fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, batch: PyTree
) -> core.ClosedJaxpr:
  """The trace of `loss_fn(params, example) -> scalar`: flat parameters, then the flat example.

  Args:
    loss_fn: of one example.
    params: arrays or their shapes.
    batch: of examples, arrays or their shapes, with the batch axis in front.

  Raises:
    MixedExamplesError: naming what could see other examples.
    ValueError: inside shard_map with check_vma=True.
  """
  for leaf in jax.tree.leaves((params, batch)):
    if jax_internals.varying_axes(leaf):
      raise ValueError(
        'clipping inside jax.shard_map needs shard_map(..., check_vma=False): the loss is traced'
        ' before it is known to vary over devices'
      )
  struct = lambda first: (
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[first:], jnp.result_type(x))
  )
  shapes = jax.tree.map(struct(0), params), jax.tree.map(struct(1), batch)
  jaxpr = jax.make_jaxpr(loss_fn)(*shapes)
  _refuse_mixing(jaxpr)
  _refuse_mixing(jax.make_jaxpr(jax.grad(loss_fn))(*shapes))
  return jaxpr


def _refuse_mixing(jaxpr: core.ClosedJaxpr) -> None:
  for eqn, own_axes in _equations(jaxpr.jaxpr):
    reason = _way_around(eqn, own_axes)
    if reason:
      raise MixedExamplesError(
        f'the loss of one example has {reason}, which can see other examples; clipping bounds'
        ' nothing then. Let the loss be a function of its example alone'
      )


def _way_around(eqn: core.JaxprEqn, own_axes: frozenset[str]) -> str | None:
  """What in an equation could see the batch, in words; the loss itself named `own_axes`."""
  others = jax_internals.axes_of(eqn) - own_axes
  if others:
    return f'{eqn.primitive.name} over the named axis {", ".join(sorted(others))}'
  if eqn.primitive.name == 'custom_vmap_call':
    rule = eqn.params['rule']
    if jax_internals.is_one_by_one(rule):
      return None
    return f'a batching rule of its own, {getattr(rule, "__name__", rule)} (custom_vmap)'
  if eqn.primitive.name in jax_internals.CALLS_OUT:
    method = eqn.params.get('vmap_method')
    if method not in jax_internals.ONE_BY_ONE:
      return f"{eqn.primitive.name} with vmap_method={method!r} (allowed: 'sequential')"
  if eqn.primitive is primitives.rng_uniform_p:
    return 'rng_uniform, of a generator that all examples share'
  generators = jax_internals.generators_of(eqn) - {jax_internals.THREEFRY}
  if generators:
    name = ', '.join(sorted(generators))
    return f'{eqn.primitive.name} of {name}, all drawn from the first key (allowed: threefry2x32)'
  return None


def _equations(
  jaxpr: core.Jaxpr, own_axes: frozenset[str] = frozenset()
) -> Iterator[tuple[core.JaxprEqn, frozenset[str]]]:
  """Every equation, those inside of others too, with the axes that those named."""
  for eqn in jaxpr.eqns:
    yield eqn, own_axes
    inside = own_axes | jax_internals.axes_named_by(eqn)
    for inner in jax_internals.inner_jaxprs(eqn):
      yield from _equations(inner, inside)
