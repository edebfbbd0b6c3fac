"""Makes a data set of captioned pictures of the icons in one public npm package.

    npm pack @iconify/json
    python -m tools.prepare_icons PACKAGE OUT [--side=64] [--workers=N]

PACKAGE is the tarball, which is read as it is, or the folder of its files. About 300,000 pictures
of 200 design sets under free licences, each with the names that its designer gave it as captions.
They are drawn by resvg (`pip install '.[icons]'`), in some minutes on two cores.

OUT gets a folder of tar shards for each split (train, probe, test) with a manifest; vocabulary.txt,
the words that the design sets of `probe` use, which are in no training shard; and DATA.md: splits,
concepts, design sets with authors and licences. A source of a config reads them by

    name='tar_shards', path='OUT/train/manifest.json', caption_key='json:captions'

and with label_key='label' has the concept that a picture shows, where its names tell.

Sets that are drawn stay in OUT/drawn until all is done, so the same command goes on after an
interruption. Equal packages, sides and versions of resvg and Pillow give equal shards. Prints one
JSON line: {"side", "package", "resvg", "pillow", "splits", "left_out", "left_out_by_set",
"vocabulary"}, which is OUT/summary.json too. Exits 2 if something is wrong.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import concurrent.futures
import concurrent.futures.process
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from dpcap.data import watchdog
from dpcap.data.tar_index import write_whole
from dpcap.errors import UserError
from tools.arguments import Parser, program
from tools.icon_parts import shards
from tools.icon_parts.drawing import Drawn, draw_set, load_drawn
from tools.icon_parts.package import BRING_IT, Package
from tools.icon_parts.splits import SPLITS, split_of
from tools.icon_parts.vocabulary import make_vocabulary
from tools.parallel import show_progress

_SIDES = (8, 1024)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The checked options.

  Raises:
    UserError: naming the option, its value and what is allowed.
  """
  parser = Parser('tools.prepare_icons', __doc__)
  add = parser.add_argument
  add('package', nargs='?', metavar='PACKAGE', help='tarball or folder of @iconify/json')
  add('out', nargs='?', metavar='OUT', help='folder to write')
  add('--side', type=int, default=64, help='of the pictures, in pixels')
  add('--workers', type=int, default=os.cpu_count(), help='processes; one per core if not given')
  options = parser.parse_args(argv)
  if options.package is None:
    raise UserError(f'PACKAGE is missing; `{BRING_IT}` brings it')
  if options.out is None:
    raise UserError('OUT is missing; give the folder to write')
  if not _SIDES[0] <= options.side <= _SIDES[1]:
    raise UserError(f'--side={options.side} must be {_SIDES[0]} to {_SIDES[1]}')
  if options.workers < 1:
    raise UserError(f'--workers={options.workers} must be 1 or more')
  return options


def renderer_version() -> str:
  """The version of resvg that draws.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.metadata.version('resvg-py')
  except importlib.metadata.PackageNotFoundError as error:
    raise UserError("resvg-py, which draws icons, is missing; pip install '.[icons]'") from error


def claim(out: pathlib.Path, made_of: dict[str, Any]) -> None:
  """Makes OUT the place of these pictures, or finds that it is.

  Raises:
    UserError: it holds something else.
  """
  file = out / 'made_of.json'
  if file.exists():
    try:
      found = json.loads(file.read_text())
    except ValueError as error:
      raise UserError(f'{file}: damaged ({error}); give another folder') from error
    if found != made_of:
      raise UserError(
        f'OUT is {out}: holds icons of {found}, not of {made_of}; give another folder'
      )
  elif out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'OUT is {out}: holds something else; give a new or an empty folder')
  else:
    write_whole(str(file), json.dumps(made_of).encode())


def draw_all(
  package: Package, todo: list[str], side: int, folder: pathlib.Path, workers: int
) -> Iterator[tuple[str, Drawn]]:
  """Draws design sets in parallel; yields (name, what was drawn) as they are done.

  Raises:
    UserError: a set is damaged, or a renderer died.
  """
  context = multiprocessing.get_context('forkserver')
  # Imported once, there, instead of in each process.
  context.set_forkserver_preload(['tools.icon_parts.drawing'])
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, watchdog.follow_parent)
  running: dict[concurrent.futures.Future, str] = {}

  def finished(most: int) -> Iterator[tuple[str, Drawn]]:
    while len(running) > most:
      for future in concurrent.futures.wait(running, return_when='FIRST_COMPLETED').done:
        name = running.pop(future)
        try:
          yield name, future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
          names = ', '.join(sorted([name, *running.values()]))
          raise UserError(f'PACKAGE: the renderer died on an icon of one of {names}') from error

  try:
    for name, content in package.sets(todo):
      running[pool.submit(draw_set, name, content, side, folder)] = name
      yield from finished(2 * workers)
    yield from finished(0)
  finally:
    # Who interrupts does not wait for a set of thousands: the processes end with this one.
    pool.shutdown(wait=False, cancel_futures=True)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
  """Makes what the options ask for; returns the summary.

  Raises:
    UserError, OSError: as of the parts.
  """
  out = pathlib.Path(options.out)
  made_of = {'side': options.side, 'resvg': renderer_version()}
  made_of['pillow'] = importlib.metadata.version('pillow')
  package = Package(options.package)
  made_of['package'] = package.version
  claim(out, made_of)
  finished = out / 'summary.json'  # written last
  if finished.exists():
    return json.loads(finished.read_text())
  splits = {name: split_of(name, about) for name, about in sorted(package.collections.items())}
  splits = {name: split for name, split in splits.items() if split}
  folder = out / 'drawn'
  drawn = {name: load_drawn(name, folder) for name in splits}
  todo = {n: package.collections[n].get('total', 0) for n, found in drawn.items() if not found}
  drawing = draw_all(package, list(todo), options.side, folder, options.workers)
  for name, found in show_progress('drawing', drawing, sum(todo.values()), 'icons', todo.get):
    drawn[name] = found
  kept, left_out = shards.arrange({name: (splits[name], drawn[name]) for name in splits})
  by_set = {name: found.left_out for name, found in drawn.items() if found.left_out}
  for reasons in by_set.values():
    for reason, count in reasons.items():
      left_out[reason] = left_out.get(reason, 0) + count
  summary = made_of | {'splits': {}, 'left_out': left_out, 'left_out_by_set': by_set}
  for split in SPLITS:
    number = shards.write_split(out, split, kept[split], folder)
    summary['splits'][split] = shards.count(kept[split]) | {'shards': number}
  # None of these is trained on, so their words give nothing away.
  names = (r.captions for n, of in splits.items() if of == 'probe' for r in drawn[n].records)
  vocabulary = make_vocabulary(itertools.chain.from_iterable(names))
  write_whole(str(out / 'vocabulary.txt'), '\n'.join([*vocabulary, '']).encode())
  summary['vocabulary'] = len(vocabulary)
  write_whole(str(out / 'DATA.md'), shards.describe(package, kept, summary).encode())
  write_whole(str(finished), json.dumps(summary, indent=1).encode())
  shutil.rmtree(folder)
  return summary


@program
def main(argv: list[str] | None) -> None:
  """Makes the data set and prints its summary."""
  options = parse(argv)
  try:
    summary = prepare(options)
  except OSError as e:
    raise UserError(f'{e.filename or "OUT"}: {e.strerror or e}') from e
  print(json.dumps(summary))


if __name__ == '__main__':
  sys.exit(main())
