"""The npm package @iconify/json, packed or unpacked: design sets of icons, one JSON file each."""

import json
import os
import pathlib
import re
import tarfile
from collections.abc import Collection, Iterator
from typing import Any

from dpcap.errors import UserError

BRING_IT = 'npm pack @iconify/json'

_PREFIX = re.compile(r'[a-z0-9]+(-[a-z0-9]+)*')


class Package:
  """The package at a path, which is its tarball or a folder that holds its files.

  A tarball is read as a stream and never unpacked.

  Attributes:
    version: of the package.
    collections: what it says of each design set, by the set's name: title, author, licence.

  Raises:
    UserError: it is not there, or no such package.
  """

  def __init__(self, path: str | os.PathLike):
    self._path = pathlib.Path(path)
    if not self._path.exists():
      raise UserError(f'PACKAGE is {path}: not there; `{BRING_IT}` brings it')
    wanted = {'package.json', 'collections.json'}
    found = dict(self._files(wanted))
    try:
      missing = wanted - found.keys()
      if missing:
        raise ValueError(f'it has no {min(missing)}')
      about = json.loads(found['package.json'])
      if about['name'] != '@iconify/json':
        raise ValueError(f'it is {about["name"]!r}')
      self.version = str(about['version'])
      self.collections: dict[str, dict[str, Any]] = json.loads(found['collections.json'])
      strange = [name for name in self.collections if not _PREFIX.fullmatch(name)]
      if strange:
        raise ValueError(f'a set is named {strange[0]!r}')
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise UserError(
        f'PACKAGE is {path}: not @iconify/json, its tarball or folder ({error});'
        f' `{BRING_IT}` brings it'
      ) from error

  def sets(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, JSON) of these sets, in the order of the package.

    Raises:
      UserError: one is missing, or the tarball is damaged.
    """
    missing = set(names)
    for file, content in self._files({f'json/{name}.json' for name in names}):
      name = pathlib.PurePath(file).stem
      missing.discard(name)
      yield name, content
    if missing:
      raise UserError(f'PACKAGE is {self._path}: it has no json/{min(missing)}.json')

  def _files(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """(path in the package, content) of those that are there, until all are found."""
    missing = set(wanted)
    if self._path.is_dir():
      # npm packs everything into a folder of that name.
      inner = self._path / 'package'
      folder = inner if inner.is_dir() else self._path
      for file in sorted(wanted):
        if (folder / file).is_file():
          yield file, (folder / file).read_bytes()
      return
    try:
      with tarfile.open(self._path, 'r|*') as tar:
        for member in tar:
          file = member.name.removeprefix('package/')
          if file in missing and member.isfile():
            missing.discard(file)
            yield file, tar.extractfile(member).read()
            if not missing:
              return
    except (tarfile.TarError, EOFError, OSError) as error:
      raise UserError(f'PACKAGE is {self._path}: not a whole tarball ({error})') from error
