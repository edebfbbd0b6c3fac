"""Images that lie in files of their own: in a folder for each class, or named one by one."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

from dpcap.data.contents import ImageFiles, read_image_ids
from dpcap.data.source import BadRecord, Record
from dpcap.errors import UserError
from dpcap.key import GIVEN, Key

_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.avif')
_FILES_PER_PART = 1024


class ImageFolder:
  """A source over the images of one split, PATH/SPLIT/CLASS/IMAGE; see `dpcap.data.source.Source`.

  Classes and images are in the order of their names; folders within a class count too. There are no
  captions.

  Args:
    path: folder of the splits.
    split: folder within it.

  Attributes:
    class_names: names of the class folders.
    fingerprint: of names, sizes and times of all images.
    contents: the image files.

  Raises:
    UserError: if the folder is missing, holds no class, or a class has no image.
  """

  KEYS = {
    'path': Key(str, '', 'folder of the splits, in them one of each class', check=GIVEN),
    'split': Key(str, '', 'folder of the split', check=GIVEN),
  }

  def __init__(self, path: str, split: str):
    root = pathlib.Path(path) / split
    if not root.is_dir():
      near = sorted(p.name for p in root.parent.glob('*/')) if root.parent.is_dir() else []
      found = f'; {path} has {", ".join(near[:10])}' if near else ''
      raise UserError(f'image folder {root}: no such folder{found}')
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not folders:
      raise UserError(f'image folder {root}: no class folders; expected {root}/CLASS/IMAGE')
    self.class_names = tuple(folder.name for folder in folders)
    self._files: list[tuple[str, int]] = []
    digest = hashlib.sha256()
    for label, folder in enumerate(folders):
      images = sorted(_images(folder))
      if not images:
        raise UserError(
          f'image folder {folder}: a class without an image; expected {", ".join(_EXTENSIONS)}'
        )
      for image, state in images:
        digest.update(repr((image, state)).encode())
        self._files.append((image, label))
    self.fingerprint = digest.hexdigest()

  @property
  def contents(self) -> ImageFiles:
    """The image files of the split."""
    return _contents(self.fingerprint, [path for path, _ in self._files])

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    """Reads one image; see `dpcap.data.source.Source`.

    Raises:
      BadRecord: the file cannot be read.
      IndexError: the index is out of range.
    """
    if not 0 <= index < len(self):
      raise IndexError(f'index {index} out of range: there are {len(self)} images')
    return _read(*self._files[index])


class ImageList:
  """A source over image files by name, without captions and labels; one may be missing.

  Args:
    folder: that the names are in.
    names: of the files.

  Attributes:
    class_names: empty.
    fingerprint: of names, sizes and times.
    contents: the image files.
  """

  class_names = ()

  def __init__(self, folder: str, names: Sequence[str]):
    self._paths = [os.path.join(folder, name) for name in names]

  @property
  def fingerprint(self) -> str:
    """Of a file that is missing, the name."""
    digest = hashlib.sha256()
    for path in self._paths:
      state = _state(path) if os.path.isfile(path) else None
      digest.update(repr((path, state)).encode())
    return digest.hexdigest()

  @property
  def contents(self) -> ImageFiles:
    """The image files that are there, each once."""
    return _contents(self.fingerprint, list(dict.fromkeys(self._paths)))

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Record:
    """Reads one image; see `dpcap.data.source.Source`.

    Raises:
      BadRecord: the file cannot be read.
    """
    return _read(self._paths[index], label=-1)


def _read(path: str, label: int) -> Record:
  try:
    with open(path, 'rb') as file:
      return Record(image=file.read(), caption=None, label=label)
  except OSError as e:
    raise BadRecord(f'{path}: {e.strerror}') from e


def _contents(fingerprint: str, paths: list[str]) -> ImageFiles:
  starts = range(0, len(paths), _FILES_PER_PART)
  parts = [functools.partial(read_image_ids, paths[i : i + _FILES_PER_PART]) for i in starts]
  return ImageFiles('image_folder', fingerprint, frozenset(), parts, len(paths))


def _state(path: str) -> tuple[int, int]:
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def _images(folder: pathlib.Path):
  """(name, (size, time)) of all images below a folder."""
  for place, _, names in os.walk(folder):
    for name in names:
      if name.lower().endswith(_EXTENSIONS) and not name.startswith('.'):
        path = os.path.join(place, name)
        yield path, _state(path)
