"""The command line of tools.search, checked."""

import argparse
import dataclasses
import itertools
import math
import pathlib
import re
from typing import Any

from dpcap.errors import UserError
from tools.arguments import Parser
from tools.search_parts import simulation
from tools.search_parts.measuring import Experiment
from tools.search_parts.planner import Budget

_OVERRIDE = re.compile(r'--config\.([\w.]+)=(.*)', re.DOTALL)
_SWEEP = re.compile(r'([\w.]+)=(.+)', re.DOTALL)
_COMMA = re.compile(r',(?![^(]*\))')  # not within a tuple

# What --sizes, --ratios, --batch and --steps say, and what makes the law hold.
_OWN = ('model.size', *simulation.simulated(1.0, 1, 1))


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked for.

  Attributes:
    workdir: where everything goes.
    experiment: what the runs have in common.
    sizes, ratios: of the simulated runs; one of each in a sweep.
    budget: to be planned for, if any.
    check_compute: most that a real run may take, floating-point operations; None: there is none.
    choices: of a sweep, key -> value of each run; empty: it is none.
  """

  workdir: pathlib.Path
  experiment: Experiment
  sizes: list[str]
  ratios: list[float]
  budget: Budget | None
  check_compute: float | None
  choices: list[dict[str, Any]]


def parse(argv: list[str] | None, description: str) -> Options:
  """The checked options.

  Raises:
    UserError: naming the one that is wrong, and what is allowed.
  """
  given, overrides = _read(argv, description)
  if given.batch < 1 or given.steps < 1:
    raise UserError(
      f'--batch is {given.batch} and --steps is {given.steps}; both must be at least 1'
    )
  ratios = [_number('--ratios', text) for text in given.ratios.split(',')]
  sizes = given.sizes.split(',')
  for name, values in (('--ratios', ratios), ('--sizes', sizes)):
    if len(set(values)) < len(values):
      raise UserError(f'{name} names something twice: {",".join(map(str, values))}')
  choices = _choices(given.sweep)
  if choices and (len(sizes) > 1 or len(ratios) > 1):
    raise UserError(
      f'--sweep goes with one size and one ratio; --sizes is {given.sizes} and --ratios is'
      f' {given.ratios}'
    )
  for key in overrides:
    if key in _OWN and not (choices and key.startswith('optimizer.')):
      raise UserError(
        f'--config.{key}: a search sets this key itself (--sizes, --ratios, --batch, --steps)'
      )
  budget = _budget(given)
  if choices and budget:
    raise UserError('--sweep and --epsilon exclude each other: a sweep makes no plan')
  if given.check is not None and not budget:
    raise UserError('--check goes with --epsilon, --dataset_size and --compute')
  return Options(
    workdir=given.workdir,
    experiment=Experiment(
      given.config, overrides, given.batch, given.steps, public=given.public_data
    ),
    sizes=sizes,
    ratios=ratios,
    budget=budget,
    check_compute=given.check,
    choices=choices,
  )


def _read(argv, description) -> tuple[argparse.Namespace, dict[str, Any]]:
  parser = Parser('tools.search', description)
  number = lambda text: _number('a budget', text)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--config', default='configs/scenes.py:dpcap')
  parser.add_argument('--sizes', default='micro,demo', help='values of model.size')
  parser.add_argument('--ratios', default='3e-4,1e-3,3e-3', help='of sigma / B')
  parser.add_argument('--batch', type=int, default=64, help='images of a simulated step')
  parser.add_argument('--steps', type=int, default=400, help='of a simulated run')
  parser.add_argument('--epsilon', type=number)
  parser.add_argument('--dataset_size', type=int, help='N')
  parser.add_argument('--delta', type=number, help='1 / N unless given')
  parser.add_argument('--compute', type=number, help='floating-point operations')
  parser.add_argument('--check', type=number, nargs='?', const=math.inf)
  parser.add_argument('--sweep', action='append', default=[], metavar='KEY=V1,V2,...')
  parser.add_argument('--public_data', action='store_true')
  given, rest = parser.parse_known_args(argv)
  overrides = {}
  for argument in rest:
    match = _OVERRIDE.fullmatch(argument)
    if not match:
      raise UserError(f'unknown argument {argument!r}; --help lists them')
    overrides[match[1]] = simulation.read_value(match[2])
  return given, overrides


def _number(name, text):
  try:
    number = float(text)
  except ValueError:
    number = math.nan
  if not 0 < number < math.inf:
    raise UserError(f'{name} holds {text!r}; it must be a finite number above 0')
  return number


def _budget(given):
  parts = given.epsilon, given.dataset_size, given.compute
  if all(part is None for part in (*parts, given.delta)):
    return None
  if any(part is None for part in parts):
    raise UserError('a budget is --epsilon, --dataset_size and --compute; give all three or none')
  if given.dataset_size < 1:
    raise UserError(f'--dataset_size is {given.dataset_size}; it must be at least 1')
  delta = 1 / given.dataset_size if given.delta is None else given.delta
  if not delta < 1:
    raise UserError(f'--delta is {delta}; it must be below 1')
  return Budget(given.dataset_size, given.epsilon, delta, given.compute)


def _choices(sweeps):
  keys = {}
  for text in sweeps:
    match = _SWEEP.fullmatch(text)
    if not match:
      raise UserError(f'--sweep is {text!r}; it must be KEY=VALUE,VALUE,...')
    key, values = match[1], [simulation.read_value(value) for value in _COMMA.split(match[2])]
    if key in _OWN and not key.startswith('optimizer.'):
      raise UserError(
        f'--sweep={key}: a search sets this key itself (--sizes, --ratios, --batch, --steps)'
      )
    if key in keys:
      raise UserError(f'--sweep names {key} twice')
    keys[key] = values
  return [dict(zip(keys, values)) for values in itertools.product(*keys.values())] if keys else []
