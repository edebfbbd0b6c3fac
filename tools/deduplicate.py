"""Finds exact and near duplicates among the pictures of tar shards; writes a manifest with groups.

    python -m tools.index_shards SHARDS...
    python -m tools.deduplicate MANIFEST [OUT] [--keep=all|one] [--sheet=FILE.private.png]

A picture that is in the data nine times is not protected by the guarantee of one record. OUT is
what `data.source.path` of a config becomes instead of MANIFEST (of tools.index_shards or
tools.prepare_icons); without it, MANIFEST with `.keep_all` or `.keep_one` before its ending.

--keep=all: the group is the unit of privacy. N is the number of groups; of a group that a step
draws, one record is drawn. Nothing is thrown away, and however often a picture is there, it adds no
more than one does. --keep=one: of each group the first record is kept, and the guarantee speaks of
those; the others are in no draw and not in N.

Caught are copies with the same pixels, and pictures that look the same in grey: resized, squeezed,
saved anew as JPEG, lighter or darker, of other colours that are as light. Not caught are parts of a
picture (4 of 64 pixels cut off are enough), mirrored or turned ones, negatives, and text or a frame
laid over it: they are other pictures here. Captions do not count. Groups hang together by pairs, so
two of a large one may look less alike. Flags and logos that differ in colour alone are taken for
one; --sheet draws the largest groups and some at random, to be looked at.

What is kept of a shard's pictures lies in a file beside its index. A shard that has it is not read
again, so the same command goes on after an interruption. On many machines, run it with --part=0/64
to --part=63/64, which read a part of the shards each and write no manifest, then once without: the
indexes, made with --index_dir, must be where all reach. That last run holds 300 bytes a picture.

Prints one JSON line: {"records", "undecodable", "exact_copies", "near_copies",
"groups_of_several", "largest", "keep", "examples", "manifest", "read", "seconds"}. Copies are
records beyond the first of their group, exact ones those with the pixels of an earlier record;
`largest` are sizes of groups; `examples` is N; `read` counts the shards that were read now. With
--part: {"shards", "read", "seconds"}. Exits 2 if something is wrong.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import concurrent.futures.process
import itertools
import json
import os
import sys
import time

import numpy as np

from dpcap.data import groups as groups_lib
from dpcap.data import tar_manifest
from dpcap.data.tar_index import Index
from dpcap.errors import UserError
from tools.arguments import Parser, program
from tools.dedup_parts import near, sheet
from tools.dedup_parts.pictures import Pictures, load, load_all, read_shard
from tools.parallel import EXECUTORS, run_each, show_progress

_LARGEST = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The checked options; `part` becomes a pair of numbers.

  Raises:
    UserError: naming the option, its value and what is allowed.
  """
  parser = Parser('tools.deduplicate', __doc__)
  add = parser.add_argument
  add('manifest', metavar='MANIFEST', help='of tools.index_shards or tools.prepare_icons')
  add('out', nargs='?', metavar='OUT', help='manifest to write')
  add('--keep', default='all', choices=groups_lib.KEEP, help='all: groups are units; one: of each')
  add('--bits', type=int, default=4, help='of 64, that hashes of near duplicates differ in at most')
  add('--sheet', help='PNG to draw groups on; it shows the data')
  add('--part', help='K/N: read the shards K, K + N, ... only, and write no manifest')
  add('--executor', default='auto', choices=EXECUTORS, help='auto: processes for local shards')
  add('--workers', type=int, help='of those; one per core, or 32 threads, if not given')
  options = parser.parse_args(argv)
  if options.workers is not None and options.workers < 1:
    raise UserError(f'--workers={options.workers} must be 1 or more')
  if not 0 <= options.bits <= near.MOST_BITS:
    raise UserError(f'--bits={options.bits} must be 0 to {near.MOST_BITS}')
  for name, ending in (('manifest', '.json'), ('out', '.json'), ('sheet', '.private.png')):
    value = getattr(options, name)
    if value and not value.endswith(ending):
      raise UserError(f'{name} is {value}; it must end in {ending}')
  if options.out is None:
    options.out = f'{options.manifest.removesuffix(".json")}.keep_{options.keep}.json'
  if options.out == options.manifest:
    raise UserError(f'OUT is {options.out}, which is MANIFEST; give another name')
  if options.part is not None:
    first, _, of = options.part.partition('/')
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
      raise UserError(f'--part={options.part} must be K/N, K from 0 to N - 1')
    options.part = int(first), int(of)
  return options


def read_shards(indexes: list[Index], executor: str, workers: int | None) -> int:
  """Makes what is kept of the pictures of shards; returns how many had none.

  Raises:
    UserError: a picture ends the process that decodes it.
  """
  results = run_each(read_shard, indexes, [index.shard for index in indexes], executor, workers)
  try:
    return sum(new for _, new in show_progress('reading', results, len(indexes)))
  except concurrent.futures.process.BrokenProcessPool as e:
    # They are begun in their order.
    unread = (index.shard for index in indexes if load(index) is None)
    begun = ', '.join(itertools.islice(unread, workers or os.cpu_count()))
    raise UserError(f'a picture ended the process that decoded it, in one of {begun}') from e


def summarize(pictures: Pictures, exact: np.ndarray, firsts: np.ndarray) -> dict:
  """What was found, JSON-ready; see `near.find_groups`."""
  numbers = np.arange(len(firsts))
  sizes = np.sort(np.bincount(firsts))[::-1]
  return {
    'records': len(firsts),
    'undecodable': int((pictures.digests == 0).sum()),
    'exact_copies': int((exact != numbers).sum()),
    'near_copies': int(((firsts != numbers) & (exact == numbers)).sum()),
    'groups_of_several': int((sizes > 1).sum()),
    'largest': sizes[:_LARGEST].tolist(),
  }


@program
def main(argv: list[str] | None) -> None:
  """Reads what is new, finds groups, and writes their manifest."""
  start = time.perf_counter()
  options = parse(argv)
  try:
    manifest = tar_manifest.read(options.manifest)
    if manifest.groups:
      raise UserError(f'MANIFEST is {options.manifest}, which has groups; give the one without')
    indexes = manifest.indexes
    if not indexes:
      raise UserError(f'MANIFEST is {options.manifest}, which lists no shard')
    if options.part:
      first, of = options.part
      indexes = indexes[first::of]
    read = read_shards(indexes, options.executor, options.workers)
    summary = {'shards': len(indexes)}
    if not options.part:
      pictures = load_all(indexes)
      exact, firsts = near.find_groups(pictures, options.bits)
      groups = groups_lib.write(options.out, firsts, options.keep)
      tar_manifest.write(options.out, indexes, manifest.wanted, groups)
      if options.sheet:
        sheet.draw(options.sheet, indexes, firsts)
      summary = summarize(pictures, exact, firsts)
      summary |= {'keep': options.keep, 'examples': groups.count, 'manifest': options.out}
  except OSError as e:
    raise UserError(f'{e.filename or options.out}: {e.strerror or e}') from e
  print(json.dumps(summary | {'read': read, 'seconds': round(time.perf_counter() - start, 2)}))


if __name__ == '__main__':
  sys.exit(main())
