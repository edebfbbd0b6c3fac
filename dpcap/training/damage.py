"""Checkpoints that are not whole: half copied, cut short, or folders that look like one.

A run goes on from the newest whole one. That is as if the damaged ones after it had been taken
away: the steps since are done again, compared with what they released, and counted
(`dpcap.privacy.keys`).
"""

import json
import pathlib

import tensorstore

from dpcap.errors import UserError

# What Orbax writes: of each item of arrays, what is in it and where.
_ARRAYS = ('model', 'training')
_FILES = (
  '_CHECKPOINT_METADATA',
  'privacy/metadata',
  *(f'{item}/{name}' for item in _ARRAYS for name in ('_METADATA', 'manifest.ocdbt')),
)


def steps(directory: pathlib.Path) -> list[pathlib.Path]:
  """All checkpoints of a directory, newest first, also damaged ones."""
  found = [path for path in directory.glob('*') if path.name.isdecimal()]
  return sorted(found, key=lambda path: int(path.name), reverse=True)


def damage(checkpoint: pathlib.Path) -> str | None:
  """What is missing or cannot be read of a checkpoint, by its files; None: nothing."""
  missing = [name for name in _FILES if not (checkpoint / name).is_file()]
  if missing:
    return f'{", ".join(missing[:2])} missing' + (' and more' if len(missing) > 2 else '')
  try:
    if isinstance(json.loads((checkpoint / 'privacy/metadata').read_text()), dict):
      return None
    return 'privacy/metadata is no JSON object'
  except (OSError, ValueError) as e:
    return f'privacy/metadata cannot be read: {e}'


def damage_of_arrays(checkpoint: pathlib.Path) -> str | None:
  """The same, by reading every array as well, one part after the other."""
  if why := damage(checkpoint):
    return why
  for item in _ARRAYS:
    try:
      store = tensorstore.KvStore.open(
        {'driver': 'ocdbt', 'base': (checkpoint / item).absolute().as_uri() + '/'}
      ).result()
      for key in store.list().result():
        # A file of parts that is not there reads as parts without content.
        if not store.read(key).result().value:
          return f'{item}: an array cannot be read: nothing is there of {key.decode()}'
    except (ValueError, OSError) as e:
      return f'{item}: an array cannot be read: {str(e).partition(chr(10))[0][:200]}'
  return None


def set_aside(directory: pathlib.Path) -> list[str]:
  """Renames what is damaged and newer than the newest whole checkpoint to STEP.damaged.

  Returns:
    What was wrong with each and what is there instead, in words.

  Raises:
    UserError: if one cannot be renamed.
  """
  said = []
  for checkpoint in steps(directory):
    why = damage_of_arrays(checkpoint)
    if why is None:
      break
    aside = next(
      path
      for number in range(1000)
      if not (path := checkpoint.with_name(f'{checkpoint.name}.damaged{number or ""}')).exists()
    )
    try:
      checkpoint.rename(aside)
    except OSError as e:
      raise UserError(f'{checkpoint}: not whole ({why}), and cannot be renamed ({e})') from e
    said.append(f'{checkpoint}: not whole ({why}); set aside as {aside.name}')
  if said:
    said.append(f'{directory}: whole checkpoints: {whole(directory)}')
  return said


def whole(directory: pathlib.Path, but: pathlib.Path | None = None) -> str:
  """The steps of a directory that have all their files, in words, without `but`."""
  found = [path.name for path in steps(directory) if damage(path) is None and path != but]
  return ', '.join(reversed(found)) or 'none'
