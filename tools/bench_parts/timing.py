"""Compiles the strategies, runs them in turn, and puts the numbers together."""

import functools
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench_parts.cases import MATMUL, PLAIN, Case, make_inputs, make_matmul, make_step
from tools.bench_parts.trace import Profile, sum_rows

OUT_OF_MEMORY = 'out of memory'

# 10^12 dense bfloat16 operations per second, as the makers state them, by the start of JAX's
# name of the device; the longest that fits counts.
PEAK_TFLOPS = {
  'NVIDIA A100': 312,
  'NVIDIA H100': 989,
  'NVIDIA H100 PCIe': 756,
  'NVIDIA H200': 989,
  'NVIDIA L4': 121,
  'NVIDIA L40S': 362,
  'TPU v4': 275,
  'TPU v5': 459,
  'TPU v5 lite': 197,
  'TPU v6 lite': 918,
}

# The chosen batch is a multiple of this: other sizes waste lanes of every accelerator.
BATCH_MULTIPLE = 8


class Program(NamedTuple):
  """A compiled program with its arguments.

  Attributes:
    run: runs it once; returns the results without waiting for them.
    compiled: of jax, with cost and memory analysis.
    compile_s: seconds that tracing and compiling took.
  """

  run: Callable[[], Any]
  compiled: jax.stages.Compiled
  compile_s: float


def compile_programs(
  case: Case, strategies: Iterable[str], clip_norm: float, say: Callable[[str], None]
) -> dict[str, Program]:
  """The programs that fit into memory: those of `strategies`, and MATMUL."""
  programs = {}
  inputs = None
  for strategy in strategies:
    say(f'compiling {strategy}')
    try:
      inputs = inputs or make_inputs(case)
      programs[strategy] = _compile(make_step(case, strategy, clip_norm), inputs)
    except Exception as e:  # which class says "no memory" is the backend's choice
      _raise_unless_out_of_memory(e)
  programs[MATMUL] = _compile(jnp.matmul, make_matmul(case.dtype))
  return programs


def _compile(function: Callable, arguments: tuple) -> Program:
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*arguments).compile()
  return Program(functools.partial(compiled, *arguments), compiled, time.perf_counter() - start)


def _raise_unless_out_of_memory(error: Exception) -> None:
  text = str(error).lower()
  signs = ('resource_exhausted', 'out of memory')
  if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
    raise error


def run_rounds(
  programs: Mapping[str, Program], rounds: int, warmup: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
  """Seconds of each program in each round; without the programs that ran out of memory.

  Args:
    programs: by name.
    rounds: timed runs of each.
    warmup: runs of each before those.
    say: takes a line on what is being done.
  """
  seconds = {name: [] for name in programs}
  for number in range(warmup + rounds):
    say(f'round {number - warmup + 1} of {rounds}' if number >= warmup else 'warming up')
    # What ran just before leaves its traces in caches and clocks: it must not always be the same.
    for name in random.Random(number).sample(list(seconds), len(seconds)):
      try:
        start = time.perf_counter()
        jax.block_until_ready(programs[name].run())
        elapsed = time.perf_counter() - start
      except Exception as e:  # which class says "no memory" is the backend's choice
        _raise_unless_out_of_memory(e)
        del seconds[name]
        continue
      if number >= warmup:
        seconds[name].append(elapsed)
  return seconds


def fits(
  case: Case, strategies: Collection[str], clip_norm: float, say: Callable[[str], None]
) -> bool:
  """Whether all strategies run this case, one at a time, without running out of memory."""
  programs = compile_programs(case, strategies, clip_norm, say)
  ran = run_rounds(programs, rounds=0, warmup=1, say=say)
  return len(ran) == len({*strategies, MATMUL})


def largest_batch(fits: Callable[[int], bool]) -> int:
  """The largest multiple of BATCH_MULTIPLE that fits, or BATCH_MULTIPLE if none does.

  Args:
    fits: whether a batch of this size does; if one does, all smaller ones must.
  """
  low = BATCH_MULTIPLE
  if not fits(low):
    return low
  while fits(2 * low):
    low *= 2
  high = 2 * low
  while high - low > BATCH_MULTIPLE:
    middle = (low + high) // 2 // BATCH_MULTIPLE * BATCH_MULTIPLE
    if fits(middle):
      low = middle
    else:
      high = middle
  return low


def describe(
  case: Case,
  strategies: Iterable[str],
  programs: Mapping[str, Program],
  seconds: Mapping[str, list[float]],
  profiles: Mapping[str, Profile],
) -> list[dict[str, Any]]:
  """The JSON lines, one per strategy; keys as the docstring of the program lists them."""
  device = jax.devices()[0].device_kind
  measured = {name: _measured(programs[name], seconds[name]) for name in seconds}
  nothing = dict.fromkeys(_measured(programs[MATMUL], [1.0]))
  plain = measured.get(PLAIN, nothing)
  matmul = _best_gflops(measured.get(MATMUL, nothing))
  lines = []
  for name in strategies:
    own = measured.get(name, nothing)
    ratios = [a / b for a, b in zip(seconds.get(name, ()), seconds.get(PLAIN, ()))]
    line = {
      'strategy': name,
      **own,
      'ratio_to_plain': statistics.median(ratios) if ratios else None,
      'ratio_quartiles': [*np.percentile(ratios, (25, 75))] if ratios else None,
      'temp_ratio_to_plain': _over(own['temp_mb'], plain['temp_mb']),
      'flops_ratio_to_plain': _over(own['flops_g'], plain['flops_g']),
      'images_per_s': _over(case.batch, own['median_s']),
      'share_of_matmul': _over(_best_gflops(own), matmul),
      'matmul_gflops_per_s': matmul,
      'share_of_peak': _over(own['gflops_per_s'], peak_gflops(device)),
      'device': device,
      **case._asdict(),
      'jax': jax.__version__,
      'error': None if name in seconds else OUT_OF_MEMORY,
    }
    if name in profiles:
      line['profile'] = _summary(profiles[name])
    lines.append({key: _rounded(value) for key, value in line.items()})
  return lines


def peak_gflops(device: str) -> float | None:
  """10^9 bfloat16 operations per second of a device that JAX calls so; None if unknown."""
  fitting = [name for name in PEAK_TFLOPS if f'{device} '.startswith((f'{name} ', f'{name}-'))]
  return PEAK_TFLOPS[max(fitting, key=len)] * 1e3 if fitting else None


def _measured(program: Program, seconds: list[float]) -> dict[str, float | None]:
  """What is known of one program without the others."""
  median = statistics.median(seconds)
  # A backend that cannot count says nothing, or -1.
  flops = (program.compiled.cost_analysis() or {}).get('flops', -1)
  memory = program.compiled.memory_analysis()
  flops_g = flops / 1e9 if flops > 0 else None
  return {
    'median_s': median,
    'min_s': min(seconds),
    'temp_mb': memory.temp_size_in_bytes / 1e6 if memory else None,
    'flops_g': flops_g,
    'gflops_per_s': _over(flops_g, median),
    'compile_s': program.compile_s,
  }


def _best_gflops(measured: Mapping[str, float | None]) -> float | None:
  """In the fastest round: whoever else used the machine hit programs of other lengths otherwise."""
  return _over(measured['flops_g'], measured['min_s'])


def _summary(profile: Profile) -> dict[str, Any]:
  kinds = {row.name: _rounded(row.ms) for row in sum_rows(profile.rows, lambda row: row.kind)}
  return {'wall_ms': _rounded(profile.wall_ms), 'kinds_ms': kinds}


def _over(a: float | None, b: float | None) -> float | None:
  return None if a is None or not b else a / b


def _rounded(value: Any) -> Any:
  """Six digits are more than a clock is worth, and readable."""
  if isinstance(value, list):
    return [_rounded(x) for x in value]
  return float(f'{value:.6g}') if isinstance(value, float) else value
