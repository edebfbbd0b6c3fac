"""What stands in a workdir besides checkpoints, and who may read it."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from dpcap.errors import UserError
from dpcap.training.damage import damage, steps

# Of a name beside the workdir (WORKDIR.secrets), and of the paths in it, with what libraries make.
_LONGEST_SUFFIX, _LONGEST_PATH_INSIDE = len('.secrets'), 400


def check_length(workdir: pathlib.Path) -> None:
  """Refuses a workdir whose files would have longer names than the file system takes.

  Raises:
    UserError: saying by how much.
  """
  there = next(path for path in workdir.parents if os.path.exists(path))
  for what, length, limit in (
    ('name', len(os.fsencode(workdir.name)) + _LONGEST_SUFFIX, os.pathconf(there, 'PC_NAME_MAX')),
    ('path', len(os.fsencode(workdir)) + _LONGEST_PATH_INSIDE, os.pathconf(there, 'PC_PATH_MAX')),
  ):
    if length > limit:
      raise UserError(
        f'--workdir: its {what} is {length - limit} bytes too long for what is made beside and in'
        f' it; the file system takes {limit}'
      )


def newest_checkpoint(workdir: pathlib.Path) -> pathlib.Path | None:
  """The directory of the newest checkpoint that has all its files.

  One that is being written has another name.
  """
  return next((path for path in steps(workdir / 'checkpoints') if damage(path) is None), None)


def find_checkpoint(path: pathlib.Path) -> pathlib.Path:
  """A checkpoint by its own directory, or the newest of a workdir.

  Raises:
    UserError: if there is none.
  """
  if (path / 'checkpoints').is_dir():
    if newest := newest_checkpoint(path):
      return newest
  elif path.name.isdecimal() and path.is_dir():
    return path
  raise UserError(
    f'{path}: holds no checkpoint; give a directory such as WORKDIR/checkpoints/1000, or WORKDIR'
  )


def read_statement(checkpoint: pathlib.Path) -> dict[str, Any]:
  """The privacy statement that a checkpoint carries, with the mark of its keys as 'ledger'.

  Raises:
    UserError: if it carries none.
  """
  path = checkpoint / 'privacy' / 'metadata'
  try:
    statement = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(
      f'{path}: cannot be read ({e}); the checkpoint is not whole, remove it to go on from the one'
      ' before'
    ) from e
  if not isinstance(statement, dict):
    raise UserError(f'{path}: damaged, holds no JSON object')
  return statement


def publish_statement(workdir: pathlib.Path) -> None:
  """Makes privacy.json the statement of the newest whole checkpoint, if there is one.

  A run that is killed between a checkpoint and its statement leaves an older one; whoever looks
  at a workdir calls this first.

  Raises:
    UserError: if the statement cannot be read or written.
  """
  published, path = None, workdir / 'privacy.json'
  # A run that goes on meanwhile may have a newer one, and no longer the one that was found.
  while (newest := newest_checkpoint(workdir)) not in (None, published):
    try:
      text = json.dumps(read_statement(newest), indent=2) + '\n'
    except UserError:
      if newest == newest_checkpoint(workdir):
        raise
      continue
    if not path.exists() or path.read_text(errors='replace') != text:
      try:
        write_whole(path, text)
      except OSError as e:
        raise UserError(f'{path}: cannot be written ({e.strerror})') from e
    published = newest


def is_private(path: pathlib.Path) -> bool:
  """Whether a file's name says that it is outside the guarantee."""
  return 'private' in path.name.split('.')[1:]


def open_to_append(path: pathlib.Path) -> TextIO:
  """Opens a text file, readable by the owner only if its name says private."""
  if is_private(path) and path.exists():
    path.chmod(0o600)
  return open(path, 'a', opener=lambda name, flags: os.open(name, flags, _mode(path)))


def write_whole(path: pathlib.Path, text: str, private: bool = False) -> None:
  """Writes a file so that it is never seen half written, nor by others if it is private.

  It is if its name says so, or `private`.
  """
  # Not of one name: programs that look at a run write beside it.
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  # One that a crash left may be open to others.
  temporary.unlink(missing_ok=True)
  descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _mode(path, private))
  with open(descriptor, 'w', encoding='utf-8') as file:
    file.write(text)
  temporary.replace(path)


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
  """Files that are made in here, by whatever library, are readable by the owner only."""
  before = os.umask(0o077)
  try:
    yield
  finally:
    os.umask(before)


def _mode(path: pathlib.Path, private: bool = False) -> int:
  return 0o600 if private or is_private(path) else 0o666  # less the umask
