"""Labelled images in a folder for each class: PATH/SPLIT/CLASS/IMAGE."""

import hashlib
import os
import pathlib

from dpcap.data.source import BadRecord, Record
from dpcap.errors import UserError

_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm')


class ImageFolder:
  """A source over the images of one split; see `dpcap.data.source.Source`.

  Classes and images are in the order of their names; folders within a class count too. There are no
  captions.

  Args:
    path: folder of the splits.
    split: folder within it.

  Attributes:
    class_names: names of the class folders.
    fingerprint: of names, sizes and times of all images.

  Raises:
    UserError: if the folder is missing, holds no class, or a class has no image.
  """

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
    name, label = self._files[index]
    try:
      with open(name, 'rb') as file:
        return Record(image=file.read(), caption=None, label=label)
    except OSError as e:
      raise BadRecord(f'{name}: {e.strerror}') from e


def _images(folder: pathlib.Path):
  """(name, (size, time)) of all images below a folder."""
  for place, _, names in os.walk(folder):
    for name in names:
      if name.lower().endswith(_EXTENSIONS) and not name.startswith('.'):
        path = os.path.join(place, name)
        status = os.stat(path)
        yield path, (status.st_size, status.st_mtime_ns)
