"""Runs a traced loss again, with a hand on every site where parameters meet examples."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from dpcap.privacy.clipping.jax_internals import CALLS, bind_again, open_jaxpr, scan_operands
from dpcap.privacy.clipping.sites import Path, Site
from dpcap.privacy.clipping.uses import Uses

# (site, x, w, slot or None) -> (output of the equation, what to record or None).
AtSite = Callable[[Site, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def replay(
  uses: Uses, params: Sequence[jax.Array], example: Any, slots: dict[Path, Any], at_site: AtSite
) -> tuple[jax.Array, dict[Path, Any]]:
  """The loss of one example, with `at_site` in place of each site's equation.

  Args:
    uses: of the loss.
    params: its flat parameters. Casts of those that sites use are left to the sites.
    example: as `find_uses` was given.
    slots: by site; where a scan is around the site, with an axis for its iterations in front.
      `at_site` gets the slot of its site and iteration, None where there is no slot.
    at_site: see AtSite.

  Returns:
    The loss, and what was recorded by site, with an axis for each scan's iterations.
  """
  inputs = [*params, *jax.tree.leaves(example)]
  (loss,), records = _replay(uses, at_site, uses.trace.jaxpr, uses.trace.consts, inputs, (), slots)
  return loss, records


def _replay(
  uses: Uses,
  at_site: AtSite,
  jaxpr: core.Jaxpr,
  consts: Sequence[Any],
  inputs: Sequence[Any],
  path: Path,
  slots: dict[Path, Any],
) -> tuple[list[Any], dict[Path, Any]]:
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  records = {}
  for i, eqn in enumerate(jaxpr.eqns):
    here = (*path, i)
    ins = [read(v) for v in eqn.invars]
    if eqn.primitive is primitives.stop_gradient_p:
      # Of a parameter, whose cast was left to the sites.
      ins = [x.astype(v.aval.dtype) for x, v in zip(ins, eqn.invars, strict=True)]
    if here in uses.sites:
      site = uses.sites[here]
      out, record = at_site(site, ins[site.x], ins[site.w], slots.get(here))
      outs, recorded = [out], {} if record is None else {here: record}
    elif here in uses.casts:
      outs, recorded = ins, {}
    elif here in uses.entered:
      inner = {at: slot for at, slot in slots.items() if at[: len(here)] == here}
      enter = _scan if eqn.primitive is primitives.scan_p else _call
      outs, recorded = enter(uses, at_site, eqn, ins, here, inner)
    else:
      outs, recorded = bind_again(eqn, ins), {}
    env.update(zip(eqn.outvars, outs, strict=True))
    records |= recorded
  return [read(v) for v in jaxpr.outvars], records


def _call(uses, at_site, eqn, ins, path, slots):
  jaxpr, consts = open_jaxpr(eqn.params[CALLS[eqn.primitive]])
  body = lambda ins, slots: _replay(uses, at_site, jaxpr, consts, ins, path, slots)
  if eqn.primitive is primitives.remat_p:
    body = jax.checkpoint(body, policy=eqn.params['policy'], prevent_cse=eqn.params['prevent_cse'])
  return body(ins, slots)


def _scan(uses, at_site, eqn, ins, path, slots):
  jaxpr, closed = open_jaxpr(eqn.params['jaxpr'])
  consts, carries = scan_operands(eqn)

  def body(carry, per_iteration):
    xs, slots = per_iteration
    inputs = [*ins[:consts], *carry, *xs]
    outs, records = _replay(uses, at_site, jaxpr, closed, inputs, path, slots)
    return outs[:carries], (outs[carries:], records)

  carry, (ys, records) = jax.lax.scan(
    body,
    ins[consts : consts + carries],
    (ins[consts + carries :], slots),
    length=eqn.params['length'],
    reverse=eqn.params['reverse'],
    unroll=eqn.params['unroll'],
  )
  return [*carry, *ys], records
