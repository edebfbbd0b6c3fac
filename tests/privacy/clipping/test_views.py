"""Views of parameters: where a chain leads, and which views share entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

from dpcap.privacy.clipping.views import (
  Loop,
  View,
  base_permutation,
  disjoint,
  through_chain,
  views_by,
)


def views_of(function, shape) -> list[View]:
  """The views that a function of equations of one operand makes of parameter 0."""
  jaxpr = jax.make_jaxpr(function)(jnp.zeros(shape)).jaxpr
  views = {jaxpr.invars[0]: View(0)}
  for eqn in jaxpr.eqns:
    views.update(zip(eqn.outvars, views_by(eqn, views[eqn.invars[0]])))
  return [views[v] for v in jaxpr.outvars]


@pytest.mark.parametrize(
  'function',
  [
    lambda w: w.T,
    lambda w: w[1:, ::2],
    lambda w: w.reshape(3, 2, 4)[::-1].swapaxes(0, 2),
    lambda w: w[None],
    lambda w: jnp.split(w, (1, 3), axis=1),
  ],
)
def test_a_chain_leads_to_the_view(function):
  w = jnp.arange(24.0).reshape(6, 4)
  for view, expected in zip(views_of(function, w.shape), jax.tree.leaves(function(w)), strict=True):
    np.testing.assert_array_equal(through_chain(view.chain, w), expected)


def test_a_scan_sees_slices_or_the_same_in_each_iteration():
  w = jnp.arange(24.0).reshape(2, 3, 4)
  slice_ = View(0).inside(Loop(sliced=True, length=2))
  sliced = slice_.then(primitives.transpose_p, permutation=(1, 0))
  np.testing.assert_array_equal(through_chain(sliced.chain, w), w.swapaxes(1, 2))
  same = View(0).inside(Loop(sliced=False, length=5))
  assert same.chain == () and same.loops == (Loop(False, 5),)


def test_a_broadcast_that_repeats_entries_is_no_view():
  jaxpr = jax.make_jaxpr(lambda w: jnp.broadcast_to(w, (3, 2)))(jnp.zeros(2)).jaxpr
  assert views_by(jaxpr.eqns[0], View(0)) == []


def test_parts_of_a_split_share_nothing_and_a_part_shares_with_the_whole():
  parts = [view.chain for view in views_of(lambda w: jnp.split(w, 3), (6, 4))]
  assert disjoint(parts, (6, 4))
  assert not disjoint([*parts, ()], (6, 4))


def test_transposes_at_the_end_do_not_change_what_is_selected():
  (view,) = views_of(lambda w: w[1:].transpose(2, 0, 1), (3, 4, 5))
  (before,) = views_of(lambda w: w[1:], (3, 4, 5))
  assert base_permutation(view, 3) == (before.chain, (2, 0, 1))
