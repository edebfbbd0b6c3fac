"""What the text of a compiled program says of each operation: kind, origin, arithmetic.

A profile names operations as XLA does (`copy_bitcast_fusion.86`), which tells nobody what to
change. The text of the same program knows what is inside and which line of the model it came from.
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

# An operation that does several of these (a fusion) is of the first kind it has, since that is
# what it is slow by; moving data alone comes last, and all other arithmetic is 'elementwise'.
DOT, CONVOLUTION, GATHER, REDUCE = 'dot', 'convolution', 'gather/scatter', 'reduce'
ELEMENTWISE, COPY, CONTROL, OTHER = 'elementwise', 'copy/transpose', 'control flow', 'other'
KINDS = (DOT, CONVOLUTION, ELEMENTWISE, REDUCE, COPY, GATHER, CONTROL, OTHER)

_DECISIVE = (
  (CONTROL, {'while', 'conditional', 'call', 'async-start', 'async-done'}),
  (DOT, {'dot', 'ragged-dot'}),
  (CONVOLUTION, {'convolution'}),
  (GATHER, {'gather', 'scatter', 'dynamic-slice', 'dynamic-update-slice', 'select-and-scatter'}),
  (REDUCE, {'reduce', 'reduce-window'}),
  (OTHER, {'sort', 'custom-call', 'rng-bit-generator', 'all-reduce', 'all-gather', 'fft'}),
)
_NO_WORK = {'parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element', 'iota', 'fusion'}
_MOVES = _NO_WORK | {
  *('copy', 'copy-start', 'copy-done', 'transpose', 'reshape', 'broadcast', 'convert'),
  *('slice', 'concatenate', 'pad', 'reverse'),
}

_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(([^)]*)\)(.*)')
_SHAPE = re.compile(r'\[([\d,]*)\]')
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r'\bcalls=%?([\w.\-]+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# As a dot has them, and as a library call on GPUs does.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')


class Operation(NamedTuple):
  """One instruction of a compiled program, with all that is fused into it.

  Attributes:
    kind: one of KINDS.
    origin: JAX's name for what it computes, as 'jit(f)/encoder/block_0/mlp_in/dot_general';
      '' where XLA does not say.
    flops: floating-point operations of its matrix products, each time it runs.
  """

  kind: str
  origin: str
  flops: int


class _Instruction(NamedTuple):
  name: str
  is_root: bool
  shape: tuple[int, ...]  # the first one's, where it returns a tuple
  opcode: str
  operands: tuple[str, ...]
  rest: str


def read_operations(text: str) -> dict[str, Operation]:
  """The operations of a program by name.

  Args:
    text: of a compiled program (`compiled.as_text()`).
  """
  computations = _read_computations(text)
  shapes = {i.name: i.shape for body in computations.values() for i in body}

  @functools.cache
  def inside(name: str) -> tuple[_Instruction, ...]:
    """The instructions of a fused computation and of those fused into it."""
    body = computations.get(name, ())
    return (*body, *(j for i in body if i.opcode == 'fusion' for j in inside(_called(i))))

  def describe(instruction: _Instruction) -> Operation:
    parts = (instruction,)
    if instruction.opcode == 'fusion':
      parts += inside(_called(instruction))
    return Operation(_kind(parts), _origin(parts), sum(_flops(i, shapes) for i in parts))

  return {i.name: describe(i) for body in computations.values() for i in body}


def _read_computations(text: str) -> dict[str, list[_Instruction]]:
  computations, body = {}, []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      body = computations.setdefault(header[1], [])
    elif found := _INSTRUCTION.match(line):
      root, name, shape, opcode, operands, rest = found.groups()
      body.append(
        _Instruction(
          name, bool(root), _dims(shape), opcode, tuple(re.findall(r'%([\w.\-]+)', operands)), rest
        )
      )
  return computations


def _dims(type_text: str) -> tuple[int, ...]:
  found = _SHAPE.search(type_text)
  return _numbers(found[1]) if found else ()


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in re.findall(r'\d+', text))


def _called(fusion: _Instruction) -> str:
  found = _CALLS.search(fusion.rest)
  return found[1] if found else ''


def _kind(parts: Iterable[_Instruction]) -> str:
  opcodes = {i.opcode for i in parts}
  for target in (found[1].lower() for i in parts if (found := _TARGET.search(i.rest))):
    if library := library_kind(target):
      return library
  for kind, decisive in _DECISIVE:
    if opcodes & decisive:
      return kind
  return COPY if opcodes <= _MOVES else ELEMENTWISE


def library_kind(name: str) -> str | None:
  """DOT or CONVOLUTION if a library function's name says so, in lower case; else None."""
  if 'conv' in name and 'convert' not in name:
    return CONVOLUTION
  words = ('gemm', 'matmul', 'nvjet', 'xmma', 'cutlass')
  return DOT if any(word in name for word in words) else None


def _origin(parts: tuple[_Instruction, ...]) -> str:
  """The name of the matrix product if there is one, else of the whole, else of the result."""
  ranks = (
    lambda i: i.opcode == 'dot',
    lambda i: i is parts[0],
    lambda i: i.is_root,
    lambda i: True,
  )
  for is_best in ranks:
    for i in parts:
      if is_best(i) and (found := _ORIGIN.search(i.rest)):
        return found[1]
  return ''


def _flops(instruction: _Instruction, shapes: dict[str, tuple[int, ...]]) -> int:
  """A multiplication and an addition for each output element and contracted index."""
  contracted = _CONTRACTED.search(instruction.rest)
  if not contracted or not instruction.operands:
    return 0
  lhs = shapes.get(instruction.operands[0], ())
  depth = math.prod(lhs[d] for d in _numbers(contracted[1]) if d < len(lhs))
  return 2 * math.prod(instruction.shape) * depth
