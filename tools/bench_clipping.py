"""Times the clipping strategies against a plain step, and says where their time goes.

    python -m tools.bench_clipping --size=nano --image_size=112 --batch=16 --vocab=8192

One physical batch of random images and captions of the captioner: forward, backward, and what
the strategy does with it; no noise, no optimizer. `plain` is the gradient of the mean loss.
--size, --depth (of the encoder), --image_size, --vocab, --dtype and --batch take lists, as
--dtype=float32,bfloat16: every combination is timed. --batch=max finds the largest batch that
fits with all the strategies (accelerators only).

Prints one JSON line per strategy (tables for people go to stderr):

  strategy, median_s   seconds per step, median over rounds; min_s the fastest
  ratio_to_plain       median over rounds of the time over plain's in the same round;
                       ratio_quartiles its first and third quartile
  images_per_s         batch over median_s
  temp_mb              memory besides arguments and results, 10^6 bytes; temp_ratio_to_plain
  flops_g              10^9 floating-point operations as XLA counts them, with a loop's body
                       counted once (a scan over layers is undercounted); flops_ratio_to_plain
  gflops_per_s         flops_g over median_s
  share_of_matmul      flops_g over min_s, over the same of one large square matrix product
                       in the same dtype, timed in the same rounds (matmul_gflops_per_s)
  share_of_peak        gflops_per_s over the chip's peak in bfloat16, whatever the dtype;
                       null for chips we have no figure of
  compile_s, device, size, depth, image_size, batch, vocab, dtype, text_length, jax
  error                null, or 'out of memory'; then everything measured is null
  profile              with --profile: milliseconds per step by kind of operation

Within a round all strategies run once, in an order that changes from round to round, so that a
machine that others use too slows all of them alike. Exits 2 if an option is wrong.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import itertools
import json
import sys
from collections.abc import Callable

import jax

from dpcap.errors import UserError
from dpcap.privacy import CLIPPING_STRATEGIES
from dpcap.privacy.clipping import SMALLEST_CLIP_NORM
from tools.arguments import Parser, program
from tools.bench_parts import cases, hlo, screen, timing, trace

MAX = 'max'
ALL_STRATEGIES = (cases.PLAIN, *CLIPPING_STRATEGIES)
PROFILED_STEPS = 3


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The checked options; each that takes a list is a list.

  Raises:
    UserError: naming the option, its value and what is allowed.
  """
  parser = Parser('tools.bench_clipping', __doc__)
  add = parser.add_argument
  add('--size', default='nano', help='sizes of the captioner, as "micro,nano"')
  add('--depth', default='', help="blocks of the encoder; the size's own if not given")
  add('--image_size', default='112', help='sides of the images, pixels')
  add('--batch', default='16', help='examples in a physical batch, or max')
  add('--vocab', default='8192', help='numbers of token ids')
  add('--dtype', default='float32', help='compute types, of float32 and bfloat16')
  add('--text_length', default='40', help='tokens of a caption')
  add('--strategies', default=','.join(ALL_STRATEGIES), help=f'of {", ".join(ALL_STRATEGIES)}')
  add('--clip_norm', default='1', help='C')
  add('--rounds', default='9', help='timed runs of each strategy')
  add('--warmup', default='2', help='runs of each strategy before those')
  add('--profile', action='store_true', help='say where the time goes, operation by operation')
  options = parser.parse_args(argv)

  options.size, options.dtype = options.size.split(','), options.dtype.split(',')
  options.depth = _whole_numbers('depth', options.depth, 1) if options.depth else [None]
  options.image_size = _whole_numbers('image_size', options.image_size, 1)
  # The id 0 is padding and carries no loss; the first token of a caption is no target.
  options.vocab = _whole_numbers('vocab', options.vocab, 2)
  options.text_length = _whole_number('text_length', options.text_length, 2)
  options.batch = [
    MAX if text == MAX else _whole_number('batch', text, 1, f' or {MAX}')
    for text in options.batch.split(',')
  ]
  if MAX in options.batch and jax.default_backend() == 'cpu':
    raise UserError(
      f'--batch={MAX} needs an accelerator, which says when it is full; give a number'
    )
  options.strategies = list(dict.fromkeys(options.strategies.split(',')))
  for strategy in options.strategies:
    if strategy not in ALL_STRATEGIES:
      raise UserError(
        f'--strategies={strategy!r} is unknown; choose from {", ".join(ALL_STRATEGIES)}'
      )
  options.clip_norm = _clip_norm(options.clip_norm)
  options.rounds = _whole_number('rounds', options.rounds, 1)
  options.warmup = _whole_number('warmup', options.warmup, 1)
  return options


def _whole_numbers(option: str, text: str, least: int) -> list[int]:
  return [_whole_number(option, part, least) for part in text.split(',')]


def _whole_number(option: str, text: str, least: int, otherwise: str = '') -> int:
  if not text.isdecimal() or int(text) < least:
    raise UserError(f'--{option}={text!r} must be a whole number of at least {least}{otherwise}')
  return int(text)


def _clip_norm(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not SMALLEST_CLIP_NORM <= value < float('inf'):
    raise UserError(f'--clip_norm={text!r} must be finite and at least {SMALLEST_CLIP_NORM}')
  return value


def list_cases(options: argparse.Namespace) -> list[cases.Case]:
  """Every combination that the options ask for; a batch of None is still to be found.

  Raises:
    UserError: if one of them is no model.
  """
  product = itertools.product(
    options.size, options.depth, options.image_size, options.vocab, options.dtype, options.batch
  )
  return [
    cases.make_case(
      size=size,
      depth=depth,
      image_size=image_size,
      vocab=vocab,
      dtype=dtype,
      batch=None if batch == MAX else batch,
      text_length=options.text_length,
    )
    for size, depth, image_size, vocab, dtype, batch in product
  ]


def run_case(
  case: cases.Case, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[dict], dict[str, trace.Profile]]:
  """Measures one combination.

  Args:
    case: what to run; its batch is looked for if it is None.
    options: from `parse`.
    say: takes a line on what is being done.

  Returns:
    One JSON line per strategy, and, if asked for, the profiles of those that ran.
  """
  if case.batch is None:
    case = case._replace(batch=_largest_batch(case, options, say))
  programs = timing.compile_programs(case, options.strategies, options.clip_norm, say)
  seconds = timing.run_rounds(programs, options.rounds, options.warmup, say)
  profiles = {}
  if options.profile:
    for name, program in programs.items():
      if name != cases.MATMUL and name in seconds:
        say(f'profiling {name}')
        operations = hlo.read_operations(program.compiled.as_text())
        profiles[name] = trace.take_profile(program.run, operations, PROFILED_STEPS)
  return timing.describe(case, options.strategies, programs, seconds, profiles), profiles


def _largest_batch(case: cases.Case, options: argparse.Namespace, say: Callable[[str], None]):
  def fits(batch: int) -> bool:
    tried = case._replace(batch=batch)
    return timing.fits(
      tried, options.strategies, options.clip_norm, lambda text: say(f'batch {batch}: {text}')
    )

  return timing.largest_batch(fits)


@program
def main(argv: list[str] | None) -> None:
  """Times what the options ask for and prints it."""
  options = parse(argv)
  for case in list_cases(options):
    with screen.status() as say:
      lines, profiles = run_case(case, options, say)
    for line in lines:
      print(json.dumps(line), flush=True)
    screen.show_lines(lines)
    for name, profile in profiles.items():
      screen.show_profile(name, profile)


if __name__ == '__main__':
  sys.exit(main())
