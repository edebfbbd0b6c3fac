"""Indexes tar shards ahead of a run, and writes the manifest that settles which samples it uses.

    python -m tools.index_shards SHARDS... [--index_dir=DIR] [--manifest=FILE] [--strict]

SHARDS are folders, files, globs or brace ranges ('/data/{00000..00041}.tar'), on local disks or in
any store that fsspec opens. Each shard gets one small file, beside it or in --index_dir. A shard
whose index is there is not read again, so the same command goes on after an interruption.

Shards that are damaged, unreadable, without samples or sorted by extension are named and left out.
The manifest lists the others: as `data.source.path` of a config it makes a run start without
looking for shards, with the number of samples that the summary tells. What the indexes hold must be
what the config asks for: give --image_keys, --caption_key and --label_key as there.

Prints one JSON line: {"examples", "with_image", "with_caption", "with_both", "repeated_keys",
"strays", "shards", "bytes", "damaged", "manifest", "indexed", "seconds"}. Examples are keys with an
image; of these `with_image` have one that holds a byte; `strays` are keys without, which do not
count; `damaged` counts the shards left out, `indexed` those that were read now. Exits 1 if no
sample can be used, also for want of captions where no --label_key is given, or with --strict if any
shard was left out; 2 if an option is wrong.

On many machines, give each of them some of the shards and an --index_dir that all reach, then run
the command once for all shards: it finds the indexes, and writes the manifest.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable

from dpcap.data import tar_manifest
from dpcap.data.byte_ranges import is_local
from dpcap.data.tar_index import THREADS, Counts, Index, Wanted, find_shards, total, try_index_shard
from dpcap.data.tar_shards import IMAGE_KEYS, describe_counts, make_wanted
from dpcap.errors import UserError
from tools.arguments import Parser, program
from tools.parallel import EXECUTORS, run_each, show_progress

_NAMED = 20  # damaged shards on the screen; the manifest lists all


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The checked options.

  Raises:
    UserError: naming the option, its value and what is allowed.
  """
  parser = Parser('tools.index_shards', __doc__)
  add = parser.add_argument
  add('shards', nargs='+', metavar='SHARDS', help='folders, files, globs or brace ranges')
  add('--index_dir', help='where indexes go, a path or URL; beside the shards if not given')
  add('--manifest', help='file to write; manifest.json in index_dir or beside the first shard')
  add('--image_keys', help=f'extensions of images; {",".join(IMAGE_KEYS)} if not given')
  add('--caption_key', default='txt', help="extension of captions, or 'json:FIELD'")
  add('--label_key', help='field of the json whose values are collected as classes')
  add('--executor', default='auto', choices=EXECUTORS, help='auto: processes for local shards')
  add('--workers', type=int, help=f'of those; one per core, or {THREADS} threads, if not given')
  add('--strict', action='store_true', help='exit 1 if any shard was left out')
  options, others = parser.parse_known_args(argv)
  if others:
    raise UserError(f'{others[0]!r} is no option; see --help')
  if options.workers is not None and options.workers < 1:
    raise UserError(f'--workers={options.workers} must be 1 or more')
  if options.manifest and not options.manifest.endswith('.json'):
    raise UserError(f'--manifest={options.manifest} must end in .json')
  return options


def count_found() -> Callable[[Index], str]:
  """A function that says how much there is in the indexes that it was called with."""
  examples = size = 0

  def count(index: Index) -> str:
    nonlocal examples, size
    examples, size = examples + index.count, size + index.size
    return f'{examples:,} examples  {size / 1e9:,.1f} GB'

  return count


def manifest_file(options: argparse.Namespace, shards: list[str]) -> str:
  """Where the manifest goes.

  Raises:
    UserError: if that does not follow from the options.
  """
  if options.manifest or options.index_dir:
    return options.manifest or f'{options.index_dir.rstrip("/")}/manifest.json'
  if not is_local(shards[0]):
    raise UserError(f'--manifest is missing; {shards[0]} is remote, and there is no --index_dir')
  return f'{os.path.dirname(shards[0])}/manifest.json'


def warn_of(samples: int, counts: Counts, wanted: Wanted) -> None:
  """Says on the screen what is odd about the samples: what they lack, and what is no sample."""
  few = 2 * counts.both < samples
  if few or counts.strays or counts.repeated or counts.images < samples:
    said = describe_counts(samples, counts, wanted)
    print('WARNING, fewer than half can be used:' if few else 'note:', said, file=sys.stderr)


@program
def main(argv: list[str] | None) -> int:
  """Indexes what the options name; returns the exit status."""
  start = time.perf_counter()
  try:
    options = parse(argv)
    wanted = make_wanted(options.image_keys, options.caption_key, options.label_key)
    shards = find_shards(options.shards)
    manifest = manifest_file(options, shards)
    work = functools.partial(try_index_shard, wanted=wanted, index_dir=options.index_dir)
    results = run_each(work, shards, shards, options.executor, options.workers)
    shown = show_progress('indexing', results, len(shards), count=count_found())
    indexes = [index for _, index in sorted(shown)]
    tar_manifest.write(manifest, indexes, wanted)
  except OSError as e:
    raise UserError(f'{e.filename or "the manifest"}: {e.strerror or e}') from e
  used = [index for index in indexes if index.count]
  damaged = [index for index in indexes if not index.count]
  for index in damaged[:_NAMED]:
    print(f'left out: {index.shard}: {index.problem}', file=sys.stderr)
  if len(damaged) > _NAMED:
    print(f'... and {len(damaged) - _NAMED} more; see {manifest}', file=sys.stderr)
  examples, counts = sum(index.count for index in used), total(index.counts for index in used)
  if used:
    warn_of(examples, counts, wanted)
  summary = {
    'examples': examples,
    'with_image': counts.images,
    'with_caption': counts.captions,
    'with_both': counts.both,
    'repeated_keys': counts.repeated,
    'strays': counts.strays,
    'shards': len(used),
    'bytes': sum(index.size for index in used),
    'damaged': len(damaged),
    'manifest': manifest,
    'indexed': sum(index.new for index in indexes),
    'seconds': round(time.perf_counter() - start, 2),
  }
  print(json.dumps(summary))
  usable = counts.both or (options.label_key and counts.images)
  return int(not usable or (options.strict and bool(damaged)))


if __name__ == '__main__':
  sys.exit(main())
