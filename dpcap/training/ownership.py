"""Whose a workdir is: one run's, whose keys lie beside it, and one program's at a time."""

import contextlib
import fcntl
import pathlib

import ml_collections

from dpcap import config as config_lib
from dpcap import privacy
from dpcap.errors import UserError
from dpcap.training import processes


def secrets_directory(workdir: pathlib.Path) -> pathlib.Path:
  """Where the keys of a run lie: beside its workdir, which may be shared, not in it.

  Beside the directory itself, by whatever path or link it is named: one run has one ledger.
  """
  workdir = workdir.resolve()
  return workdir.with_name(workdir.name + '.secrets')


def check_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses a workdir of another run, and keys and workdir that lost each other.

  Raises:
    UserError: naming the key that differs, or what to do.
  """
  path, store = workdir / 'config.json', secrets_directory(workdir)
  if not path.exists():
    if privacy.KeyStore.is_used(store):
      raise UserError(
        f'{store}: holds the keys of a run whose workdir is gone; remove it to start a new run'
        ' (what was released under those keys stays released)'
      )
    return
  if not (store / 'keys.json').exists():
    raise UserError(
      f'{store / "keys.json"}: not found, but {workdir} holds a run; without its keys it cannot go'
      ' on (bring the directory back, or start in a new workdir)'
    )
  if not privacy.KeyStore.is_used(store):
    return  # it never came to its first step
  try:
    old = config_lib.fixed_part(path.read_text())
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{path}: damaged, not the config of a run ({e!r})') from e
  new = config_lib.fixed_part(config_lib.to_json(config))
  for key in sorted(new.keys() | old.keys()):
    if old.get(key) != new.get(key):
      raise UserError(
        f'{workdir}: holds a run with {key} = {old.get(key)!r}, this config has'
        f' {new.get(key)!r}; resume with the same config, or take another workdir'
      )


@contextlib.contextmanager
def lock(workdir: pathlib.Path):
  """Keeps a second process from the run: two would write one ledger."""
  directory = secrets_directory(workdir)
  with contextlib.ExitStack() as stack:

    def take():
      directory.mkdir(mode=0o700, parents=True, exist_ok=True)
      file = stack.enter_context((directory / 'lock').open('w'))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise UserError(f'{workdir}: another process is training this run') from None

    processes.from_main(take)
    yield
