"""Views: what a model does to a parameter before an example meets it.

A view is a selection of a parameter's entries, each at most once, in some order: a reshape, a
transpose, a slice, and the slices that a scan takes, one after the other. It is kept as a chain of
these steps. They are linear, so that their transpose leads from the gradient of a view back to that
of its parameter.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

# What keeps each entry at most once; of broadcasts, those that only add axes of size one.
_SELECTIONS = (
  primitives.reshape_p,
  primitives.transpose_p,
  primitives.squeeze_p,
  primitives.slice_p,
  primitives.rev_p,
  primitives.broadcast_in_dim_p,
)

# Comparing all entries of larger parameters would take long; their views count as overlapping.
_LARGEST_COMPARED = 2**24


class Step(NamedTuple):
  """One step from a parameter to a view of it."""

  primitive: Any  # None: a scan takes a slice per iteration
  params: tuple[tuple[str, Any], ...] = ()


SLICED_BY_SCAN = Step(None)

Chain = tuple[Step, ...]


class Loop(NamedTuple):
  """A scan around a site. `sliced`: each iteration sees its own slice of the parameter."""

  sliced: bool
  length: int


class View(NamedTuple):
  """A selection of a parameter's entries.

  Attributes:
    leaf: index of the parameter.
    chain: the steps that lead to it; casts are left out.
    loops: the scans around it, outermost first.
  """

  leaf: int
  chain: Chain = ()
  loops: tuple[Loop, ...] = ()

  def then(self, primitive, **params) -> 'View':
    """The view that an operation makes of this one."""
    return self._replace(chain=(*self.chain, Step(primitive, tuple(sorted(params.items())))))

  def inside(self, loop: Loop) -> 'View':
    """What an iteration of a scan sees of this view."""
    chain = (*self.chain, SLICED_BY_SCAN) if loop.sliced else self.chain
    return View(self.leaf, chain, (*self.loops, loop))


def views_by(eqn: core.JaxprEqn, view: View) -> list[View]:
  """The views that an equation makes of `view`, its one operand; none if it is no selection."""
  before, after = eqn.invars[0].aval, eqn.outvars[0].aval
  spreads = eqn.primitive is primitives.broadcast_in_dim_p and before.size != after.size
  if eqn.primitive in _SELECTIONS and not spreads:
    return [view.then(eqn.primitive, **eqn.params)]
  if eqn.primitive.name == 'split':
    return [view.then(primitives.slice_p, **part) for part in _parts(before.shape, **eqn.params)]
  return []


def _parts(shape: tuple[int, ...], *, sizes: tuple[int, ...], axis: int):
  """Parameters of the slices that a split takes."""
  for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
    start, limit = [0] * len(shape), list(shape)
    start[axis], limit[axis] = end - size, end
    yield dict(start_indices=tuple(start), limit_indices=tuple(limit), strides=None)


def through_chain(chain: Chain, x: jax.Array) -> jax.Array:
  """The view of `x` that a chain leads to; slices of scans are stacked in front."""
  if not chain:
    return x
  step, rest = chain[0], chain[1:]
  if step == SLICED_BY_SCAN:
    return jax.vmap(functools.partial(through_chain, rest))(x)
  return through_chain(rest, step.primitive.bind(x, **dict(step.params)))


def base_permutation(view: View, rank: int) -> tuple[Chain, tuple[int, ...]]:
  """The view's chain without the transposes at its end, and which dimension of what comes
  before them each of its `rank` dimensions is."""
  chain, permutation = view.chain, tuple(range(rank))
  while chain and chain[-1].primitive is primitives.transpose_p:
    order = dict(chain[-1].params)['permutation']
    permutation = tuple(order[d] for d in permutation)
    chain = chain[:-1]
  return chain, permutation


def base_chain(view: View) -> Chain:
  """The view's chain without the transposes at its end: the entries that it selects."""
  return base_permutation(view, 0)[0]


def disjoint(chains: list[Chain], shape: tuple[int, ...]) -> bool:
  """Whether no entry of a parameter of this shape is in two of the views."""
  size = math.prod(shape)
  if size > _LARGEST_COMPARED:
    return False
  with jax.ensure_compile_time_eval():
    entries = jnp.arange(size).reshape(shape)
    seen = [np.asarray(through_chain(chain, entries)).ravel() for chain in chains]
  return all(not np.intersect1d(a, b).size for a, b in itertools.combinations(seen, 2))
