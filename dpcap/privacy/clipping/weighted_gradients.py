"""Sums of weighted gradients, from what sites were fed and their outputs' gradients.

The gradient of a parameter, with each example weighted, is one product over batch and tokens, as in
plain training: nothing of single examples is formed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from dpcap.privacy.clipping.outer_products import dot_axes, split_loops
from dpcap.privacy.clipping.rounding import at_least_float32, dot
from dpcap.privacy.clipping.sites import Site, roles
from dpcap.privacy.clipping.views import through_chain


def weighted_gradient(
  site: Site, x: jax.Array, g: jax.Array, weights_B: jax.Array, like: jax.Array
) -> jax.Array:
  """sum_b weights_b (gradient of example b by this site), shaped as the parameter `like`.

  Taken in at least float32; where `x` and `g` have less, the weighted one of the two is rounded
  to their type.

  Args:
    site: any.
    x: what it was fed, (loops..., B, ...).
    g: the gradient of its output, (loops..., B, ...).
    weights_B: of the examples.
    like: the parameter or its shape.
  """
  gradient = functools.partial(_of_view, site)
  x, g = _by_slice(site, x), _by_slice(site, g)
  slices = sum(loop.sliced for loop in site.view.loops)
  for _ in range(slices):
    gradient = jax.vmap(gradient, (0, 0, None))
  # Iterations that share the parameter count as further examples.
  view = gradient(x, g, jnp.repeat(weights_B, x.shape[slices] // weights_B.size))
  leaf = jax.ShapeDtypeStruct(like.shape, view.dtype)
  return jax.linear_transpose(functools.partial(through_chain, site.view.chain), leaf)(view)[0]


def _of_view(
  site: Site, x_B: jax.Array, g_B: jax.Array, weights_B: jax.Array
) -> jax.Array:
  """`weighted_gradient` with respect to the parameter's view, for a site in no loop."""
  if site.eqn.primitive is primitives.dot_general_p:
    return _of_product(site, x_B, g_B, weights_B)
  # The transpose of a convolution or a lookup, as autodiff takes it.
  dtype = jnp.promote_types(g_B.dtype, jnp.float32)
  x_B = x_B.astype(dtype) if jnp.issubdtype(x_B.dtype, jnp.floating) else x_B
  operation = lambda w: jax.vmap(lambda x: site.apply(x, w, dtype))(x_B)
  view = jax.ShapeDtypeStruct(site.eqn.invars[site.w].aval.shape, dtype)
  return jax.linear_transpose(operation, view)(_scaled(g_B, weights_B, dtype))[0]


def to_parameter(site: Site, outer: jax.Array, like: jax.Array) -> jax.Array:
  """A sum of outer products (slices..., Q, K, O), in its place in an array shaped as `like`."""
  arrange = functools.partial(_arranged, site)
  for _ in range(outer.ndim - 3):
    arrange = jax.vmap(arrange)
  leaf = jax.ShapeDtypeStruct(like.shape, outer.dtype)
  view_of = lambda leaf: arrange(through_chain(site.view.chain, leaf))
  return jax.linear_transpose(view_of, leaf)(outer)[0]


def _of_product(site: Site, x_B: jax.Array, g_B: jax.Array, weights_B: jax.Array) -> jax.Array:
  x_axes, g_axes = dot_axes(site)
  batch, inputs, outputs = roles(site)
  # A product's axes are its batches, then the others of x and of g in their own order.
  by_axis = lambda dims, axes: [d for _, d in sorted(zip(axes, dims, strict=True))]
  x = x_B, x_axes, by_axis(inputs, x_axes.bound)
  g = g_B, g_axes, by_axis(outputs, g_axes.bound)
  # The smaller one is weighed. It comes first, where XLA on CPU wants tokens last: so turned it is
  # a copy that does not stay, and the other is read as it is kept.
  small, large = (x, g) if x_B.size < g_B.size else (g, x)
  shift = lambda axes: [1 + a for a in axes]
  view = dot(
    _scaled(small[0], weights_B, small[0].dtype),
    large[0],
    (
      tuple([0, *shift(axes.free)] for _, axes, _ in (small, large)),
      tuple(shift(axes.batch) for _, axes, _ in (small, large)),
    ),
  )
  order = [*batch, *small[2], *large[2]]
  return view.transpose(sorted(range(len(order)), key=lambda i: order[i]))


def _scaled(y_B: jax.Array, weights_B: jax.Array, dtype) -> jax.Array:
  """weights_b y_b, computed in at least float32, of type `dtype`."""
  wide = at_least_float32(y_B)
  return (wide * weights_B.reshape(weights_B.shape + (1,) * (y_B.ndim - 1))).astype(dtype)


def _by_slice(site: Site, y: jax.Array) -> jax.Array:
  """(loops..., B, ...) -> (slices..., B * other loops, ...)."""
  y, sliced = split_loops(site, y)
  first = len(site.view.loops) + 1
  return y.reshape(*y.shape[:sliced], math.prod(y.shape[sliced:first]), *y.shape[first:])


def _arranged(site: Site, view: jax.Array) -> jax.Array:
  """The parameter's view in the coordinates of outer products: (Q, K, O)."""
  if site.eqn.primitive is primitives.conv_general_dilated_p:
    params = site.eqn.params
    kernel = view.transpose(params['dimension_numbers'].rhs_spec)  # outputs, inputs, space
    groups, outputs = params['feature_group_count'], kernel.shape[0]
    return kernel.reshape(groups, outputs // groups, -1).swapaxes(1, 2)
  roles_of = roles(site)
  sizes = [math.prod(view.shape[d] for d in dims) for dims in roles_of]
  return view.transpose([d for dims in roles_of for d in dims]).reshape(sizes)
