"""What is read of JAX that it does not promise to keep: all of it is here.

Written for jax 0.10 and 0.11; the tests run the zoo of models under either.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

# Calls whose body is visited as if it stood in place, and the parameter that holds it.
CALLS = {
  primitives.jit_p: 'jaxpr',
  primitives.remat_p: 'jaxpr',
  primitives.closed_call_p: 'call_jaxpr',
}

# Calls out of JAX, by the name of their primitive; `vmap_method` says what becomes of a batch.
CALLS_OUT = ('pure_callback', 'io_callback', 'ffi_call')

# The values of `vmap_method` that hand over one example at a time.
ONE_BY_ONE = ('sequential', 'sequential_unrolled')

# The type of the keys for which vmap draws each example's bits from its own key.
THREEFRY = 'key<fry>'


def generators_of(eqn: core.JaxprEqn) -> frozenset[str]:
  """What an equation draws random bits from: the types of its keys, or XLA's own generator."""
  if eqn.primitive is primitives.rng_bit_generator_p:
    return frozenset([eqn.primitive.name])
  if not eqn.primitive.name.startswith('random_'):
    return frozenset()
  types = [v.aval.dtype for v in eqn.invars]
  return frozenset(str(t) for t in types if jnp.issubdtype(t, jax.dtypes.prng_key))


def is_one_by_one(rule: Any) -> bool:
  """Whether a rule of custom_vmap is JAX's own that takes one example after the other."""
  of_jax = getattr(rule, '__module__', '') == 'jax._src.custom_batching'
  return of_jax and getattr(rule, '__qualname__', '').startswith('sequential_vmap.')


def open_jaxpr(jaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
  """The jaxpr and its constants; equations hold them with and without."""
  return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """The jaxprs among an equation's parameters, however they are nested there."""
  is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
  for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
    if is_jaxpr(value):
      yield getattr(value, 'jaxpr', value)


def scan_operands(eqn: core.JaxprEqn) -> tuple[int, int]:
  """Of a scan: how many operands are the same in all iterations, and how many are carried."""
  if 'num_consts' in eqn.params:
    return eqn.params['num_consts'], eqn.params['num_carry']
  # From jax 0.11 on.
  consts, carry, _ = eqn.params['ft_in'].update(list(range(len(eqn.invars)))).unpack()
  return len(list(consts)), len(list(carry))


def bind_again(eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
  """The outputs of an equation on other operands, under the settings that it was traced with."""
  params = eqn.primitive.get_bind_params(eqn.params)
  # Settings of its own, such as where to compute it, and its place in the model for profiles.
  with contextlib.ExitStack() as stack:
    stack.enter_context(eqn.ctx.manager)
    stack.enter_context(jax.named_scope(str(eqn.source_info.name_stack) or '.'))
    outs = eqn.primitive.bind(*operands, **params)
  return outs if eqn.primitive.multiple_results else [outs]


def axes_of(eqn: core.JaxprEqn) -> frozenset[str]:
  """The axes, by name, that an equation itself runs over."""
  found = set()
  for key in ('axis_name', 'axes'):
    value = eqn.params.get(key, ())
    found.update(value if isinstance(value, (tuple, list, frozenset)) else [value])
  return frozenset(axis for axis in found if isinstance(axis, str))


def axes_named_by(eqn: core.JaxprEqn) -> frozenset[str]:
  """The axes that an equation names for what is inside of it: those of a shard_map."""
  if eqn.primitive.name != 'shard_map':
    return frozenset()
  return frozenset(eqn.params.get('newly_manual_axes') or eqn.params['mesh'].axis_names)


def varying_axes(x: Any) -> frozenset[str]:
  """The axes of a shard_map with check_vma=True over which a value varies."""
  aval = jax.typeof(x) if isinstance(x, jax.Array) else None
  if hasattr(aval, 'manual_axis_type'):
    return frozenset(aval.manual_axis_type.varying)
  return frozenset(getattr(aval, 'vma', ()))
