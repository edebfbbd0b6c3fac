"""Files of named arrays: .safetensors, .npz and PyTorch's .pth, read without trusting them.

No code in a file is run, and nothing is read of an array before its size is known to be what is
asked for: what is opened here is the header.
"""

import argparse
import contextlib
import hashlib
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import safetensors
import safetensors.numpy
from numpy.lib import format as npy

from dpcap.errors import UserError

# What all models of the reference implementation have.
FIRST = 'patch_embed.proj.weight'

# What may stand before the names: nothing, the entry of a dict that was made flat, and what
# tools.make_oracle writes.
_PREFIXES = ('', 'model.', 'model/', 'param/')

_FLOATS = ('F64', 'F32', 'F16')  # as safetensors names them

# An npz may be compressed: what it unpacks to must be less. The largest model takes 3.3 GB as
# float64.
_MOST_BYTES = 4 * 2**30

_NPY_HEADERS = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}


class StoredArray:
  """An array in a file that is open; `np.asarray` reads it.

  Attributes:
    shape: as the header of the file says.
  """

  def __init__(self, shape: tuple[int, ...], read: Callable[[], np.ndarray]):
    self.shape = shape
    self._read = read

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # always read anew
    return np.asarray(self._read(), dtype)


@contextlib.contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Mapping[str, StoredArray]]:
  """The arrays of a file by name, readable until the context ends.

  They may stand in an entry "model" (of a .pth: a dict; else a prefix of the names, "model." or
  "model/"), or under "param/" as tools.make_oracle writes them; what stands beside is left out.

  Raises:
    UserError: naming the file, or its array, and what is wrong with it. PyTorch is needed for a
      .pth alone, which is a pickle: it is read by the loader that makes nothing but tensors.
  """
  path = os.fspath(path)
  extension = os.path.splitext(path)[1]
  if extension not in _OPENERS:
    raise UserError(f'{path}: cannot be read; files may be {", ".join(_OPENERS)}')
  if not os.path.isfile(path):
    raise UserError(f'{path}: no such file')
  with _OPENERS[extension](path) as arrays:
    yield arrays


def save_weights(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a .safetensors file.

  Raises:
    UserError: if it cannot be written, or its name ends otherwise.
  """
  path = os.fspath(path)
  if not path.endswith('.safetensors'):
    raise UserError(f'{path}: its name must end in .safetensors')
  # The library writes memory as it lies: a transposed view would come out wrong.
  dense = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  try:
    # PyTorch's libraries look for the format.
    safetensors.numpy.save_file(dense, path, metadata={'format': 'pt'})
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f'{path}: cannot be written ({e})') from e


def sha256(path: str | os.PathLike) -> str:
  """The SHA-256 of a file, hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def _open_safetensors(path: str) -> Iterator[Mapping[str, StoredArray]]:
  with contextlib.ExitStack() as stack:
    try:
      # Refuses a header whose sizes are not those of the file.
      file = stack.enter_context(safetensors.safe_open(path, framework='np'))
    except (safetensors.SafetensorError, OSError) as e:
      raise UserError(f'{path}: damaged, not a safetensors file ({_line(e)})') from e

    def stored(name: str) -> StoredArray:
      header = file.get_slice(name)
      if header.get_dtype() not in _FLOATS:
        raise UserError(
          f'{path}: {name!r} is {header.get_dtype()}; allowed: {", ".join(_FLOATS)}'
        )
      return StoredArray(tuple(header.get_shape()), lambda: file.get_tensor(name))

    yield {short: stored(name) for short, name in _below(path, file.keys()).items()}


@contextlib.contextmanager
def _open_npz(path: str) -> Iterator[Mapping[str, StoredArray]]:
  with contextlib.ExitStack() as stack:
    try:
      archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError) as e:
      raise UserError(f'{path}: damaged, not an npz file ({_line(e)})') from e
    names = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
    size = sum(info.file_size for info in names.values())
    if size > _MOST_BYTES:
      raise UserError(f'{path}: unpacks to {size:,} bytes; at most {_MOST_BYTES:,} are read')
    yield {
      short: _stored_npy(path, archive, name, names[name])
      for short, name in _below(path, names).items()
    }


def _stored_npy(
  path: str, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo
) -> StoredArray:
  @contextlib.contextmanager
  def opened():
    try:
      with archive.open(info) as file:
        yield file
    # Of an encrypted member RuntimeError, of an unknown compression NotImplementedError.
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
      raise UserError(f'{path}: {name!r} is damaged ({_line(e)})') from e

  def read():
    with opened() as file:
      return npy.read_array(file, allow_pickle=False)

  with opened() as file:
    version, _ = npy.read_magic(file)
    if version not in _NPY_HEADERS:
      raise ValueError(f'npy version {version}')
    shape, _, dtype = _NPY_HEADERS[version](file)
    described = file.tell() + math.prod(shape) * dtype.itemsize
  if dtype.kind != 'f':
    raise UserError(f'{path}: {name!r} is {dtype}; it must be of floating-point numbers')
  if described != info.file_size:
    raise UserError(
      f'{path}: {name!r} is damaged: its header tells of {described} bytes, there are'
      f' {info.file_size}'
    )
  return StoredArray(shape, read)


@contextlib.contextmanager
def _open_pth(path: str) -> Iterator[Mapping[str, StoredArray]]:
  try:
    import torch  # Large, and needed by nobody else.
  except ImportError as e:
    raise UserError(
      f'{path}: a .pth is read by PyTorch, which is not installed; install torch, or bring the file'
      ' as .safetensors or .npz'
    ) from e
  _refuse_compressed(path)
  try:
    # The reference's checkpoints hold their command line as a Namespace, which is plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  # Whatever a file that is none makes of the loader.
  except Exception as e:  # pylint: disable=broad-except
    found = re.search(r'GLOBAL (\S+)', str(e))
    # PyTorch's own words advise to trust the file.
    why = f'it names {found[1]}' if found else _line(e)
    raise UserError(f'{path}: holds more than tensors, or is damaged ({why})') from e
  if isinstance(content, Mapping) and isinstance(content.get('model'), Mapping):
    content = content['model']
  if not isinstance(content, Mapping):
    raise UserError(f'{path}: holds a {type(content).__name__}; it must be a dict of tensors')

  def stored(name: str) -> StoredArray:
    tensor = content[name]
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
      raise UserError(f'{path}: {name!r} is no tensor of floating-point numbers')
    # Numpy lacks bfloat16; what is wider than float32 stays so until it is asked for.
    read = lambda: (tensor.float() if tensor.itemsize < 4 else tensor).detach().numpy()
    return StoredArray(tuple(tensor.shape), read)

  yield {short: stored(name) for short, name in _below(path, content).items()}


def _refuse_compressed(path: str) -> None:
  """torch.save compresses nothing: what is on disk bounds what is read."""
  try:
    with zipfile.ZipFile(path) as archive:
      packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
  except (zipfile.BadZipFile, OSError) as e:
    raise UserError(
      f'{path}: not in the zip format that torch.save has written since PyTorch 1.6 ({_line(e)})'
    ) from e
  if packed:
    raise UserError(f'{path}: compressed, which torch.save never does')


_OPENERS = {'.safetensors': _open_safetensors, '.npz': _open_npz, '.pth': _open_pth}

EXTENSIONS = tuple(_OPENERS)


def _below(path: str, names) -> dict[str, str]:
  """Name without its prefix -> name, for the prefix that the file's weights have.

  Raises:
    UserError: if there are none.
  """
  names = [name for name in names if isinstance(name, str)]
  for prefix in _PREFIXES:
    if f'{prefix}{FIRST}' in names:
      return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
  raise UserError(
    f'{path}: has no array {FIRST!r}, neither as such nor in an entry "model"; it holds no weights'
    ' of the reference implementation'
  )


def _line(error: Exception) -> str:
  return str(error).partition('\n')[0][:200] or type(error).__name__
