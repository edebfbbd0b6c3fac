"""What is read of JAX that it does not promise to keep: all of it is here.

Written for jax 0.10 and 0.11; the tests run the zoo of models under either.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives as p

# Calls whose body is visited as if it stood in place, and the parameter that holds it.
CALLS = {p.jit_p: 'jaxpr', p.remat_p: 'jaxpr', p.closed_call_p: 'call_jaxpr'}

# Calls out of JAX, by the name of their primitive; `vmap_method` says what becomes of a batch.
CALLS_OUT = ('pure_callback', 'io_callback', 'ffi_call')

# The values of `vmap_method` that hand over one example at a time.
ONE_BY_ONE = ('sequential', 'sequential_unrolled')


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


def named_axes(jaxpr: core.ClosedJaxpr) -> frozenset[str]:
  """Axes that a trace refers to and that are named outside of it."""
  return frozenset(
    effect.name for effect in jaxpr.effects if type(effect).__name__ == 'NamedAxisEffect'
  )


def axes_of(eqn: core.JaxprEqn) -> frozenset[Any]:
  """The axes, by name, that an equation itself runs over."""
  found = set()
  for key in ('axis_name', 'axes'):
    value = eqn.params.get(key, ())
    found.update(value if isinstance(value, (tuple, list, frozenset)) else [value])
  return frozenset(found)


def varying_axes(x: Any) -> frozenset[str]:
  """The axes of a shard_map with check_vma=True over which a value varies."""
  return frozenset(getattr(jax.typeof(x), 'vma', ()) if isinstance(x, jax.Array) else ())
