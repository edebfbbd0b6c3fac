"""Files of weights: read as far as asked, refused in one line, and never trusted."""

import argparse
import contextlib
import io
import json
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpcap.errors import UserError
from dpcap.models.weight_files import FIRST, open_weights, save_weights, sha256

ARRAYS = {
  FIRST: np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
  'half': np.float16([1.5, -2.0]),
  'scalar': np.float64(0.1),
}


def _write(path, arrays):
  if path.suffix == '.npz':
    np.savez_compressed(path, **arrays)
  else:
    save_file({name: np.asarray(x) for name, x in arrays.items()}, path)


def _read(path):
  with open_weights(path) as arrays:
    return {name: np.asarray(x) for name, x in arrays.items()}


@pytest.mark.parametrize('prefix', ['', 'model.', 'model/', 'param/'])
@pytest.mark.parametrize('extension', ['npz', 'safetensors'])
def test_arrays_come_back_without_what_stands_before_and_beside(tmp_path, extension, prefix):
  path = tmp_path / f'weights.{extension}'
  # Beside them: an optimizer's state, of integers too.
  beside = {'optimizer/step': np.int64([3])} if prefix else {}
  _write(path, {f'{prefix}{name}': x for name, x in ARRAYS.items()} | beside)
  read = _read(path)
  assert read.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize('extension', ['npz', 'safetensors'])
def test_shapes_are_known_before_anything_is_read(tmp_path, extension):
  path = tmp_path / f'weights.{extension}'
  _write(path, ARRAYS)
  with open_weights(path) as arrays:
    array = arrays[FIRST]
    assert array.shape == (2, 3, 2, 2) and not isinstance(array, np.ndarray)
    assert np.asarray(array, np.float64).dtype == np.float64


def test_what_is_saved_is_dense_whatever_the_view(tmp_path):
  path = tmp_path / 'x.safetensors'
  save_weights(path, {FIRST: ARRAYS[FIRST].T, 'other': np.arange(6.0)[::2]})
  read = _read(path)
  np.testing.assert_array_equal(read[FIRST], ARRAYS[FIRST].T)
  np.testing.assert_array_equal(read['other'], [0, 2, 4])
  assert len(sha256(path)) == 64


def test_only_safetensors_are_written(tmp_path):
  with pytest.raises(UserError, match='must end in .safetensors'):
    save_weights(tmp_path / 'x.npz', ARRAYS)
  with pytest.raises(UserError, match='cannot be written'):
    save_weights(tmp_path / 'no/x.safetensors', ARRAYS)


def _npz(**members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(f'{name}.npy', content)
  return file.getvalue()


def _npy(array, shape=None):
  file = io.BytesIO()
  np.lib.format.write_array(file, array, allow_pickle=True)
  content = file.getvalue()
  if shape:
    old = f"'shape': {array.shape}, }}"
    new = f"'shape': {shape}, }}"
    # The header is padded: what it gains in length it loses in spaces.
    content = content.replace(old.encode() + b' ' * (len(new) - len(old)), new.encode())
    assert new.encode() in content
  return content


def _safetensors(header, data=b''):
  text = json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


class Bomb:
  """What runs a program when it is unpickled."""

  def __reduce__(self):
    return (pytest.fail, ('code of a file was run',))


_FLOATS = np.zeros(3, np.float32)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('x.npz', b'no zip', 'not an npz file'),
    ('x.npz', _npz(**{FIRST: b'no npy'}), f"'{FIRST}' is damaged"),
    ('x.npz', _npz(**{FIRST: _npy(_FLOATS)[:20]}), f"'{FIRST}' is damaged"),
    ('x.npz', _npz(**{FIRST: _npy(_FLOATS)[:-2]}), 'tells of 140 bytes, there are 138'),
    ('x.npz', _npz(**{FIRST: _npy(_FLOATS, (10**9, 10**9))}), 'is damaged: its header'),
    ('x.npz', _npz(**{FIRST: _npy(np.array([Bomb()]))}), 'is object; it must be of floating'),
    ('x.npz', _npz(**{FIRST: _npy(np.int32([1]))}), 'is int32; it must be of floating'),
    ('x.npz', _npz(other=_npy(_FLOATS)), f"no array '{FIRST}'"),
    ('x.safetensors', b'', 'not a safetensors file'),
    ('x.safetensors', struct.pack('<Q', 2**60), 'not a safetensors file'),
    (
      'x.safetensors',
      _safetensors({FIRST: {'dtype': 'F32', 'shape': [10**6], 'data_offsets': [0, 4_000_000]}}),
      'not a safetensors file',
    ),
    (
      'x.safetensors',
      _safetensors({FIRST: {'dtype': 'I32', 'shape': [1], 'data_offsets': [0, 4]}}, b'\0' * 4),
      'is I32; allowed: F64, F32, F16',
    ),
    ('x.bin', b'', 'cannot be read; files may be .safetensors, .npz, .pth'),
  ],
)
def test_what_is_not_to_be_trusted_is_refused(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as e:
    _read(path)
  assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_what_unpacks_to_more_than_any_model_is_refused(tmp_path, monkeypatch):
  path = tmp_path / 'x.npz'
  _write(path, {FIRST: np.zeros(10_000)})
  assert path.stat().st_size < 1000
  monkeypatch.setattr('dpcap.models.weight_files._MOST_BYTES', 10_000)
  with pytest.raises(UserError, match='unpacks to 80,128 bytes; at most 10,000'):
    _read(path)


def test_a_missing_file_is_told(tmp_path):
  with pytest.raises(UserError, match='no such file'):
    _read(tmp_path / 'x.npz')


def test_a_pth_without_torch_names_other_kinds(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)  # importing it raises ImportError
  (tmp_path / 'x.pth').write_bytes(b'')
  with pytest.raises(UserError, match='torch, or bring the file as .safetensors or .npz'):
    _read(tmp_path / 'x.pth')


class _Tensor:
  """As much of a torch.Tensor as is used."""

  def __init__(self, array):
    self.array, self.shape, self.itemsize = array, array.shape, array.itemsize

  def is_floating_point(self):
    return self.array.dtype.kind == 'f'

  def float(self):
    return _Tensor(self.array.astype(np.float32))

  def detach(self):
    return self

  def numpy(self):
    return self.array


@pytest.fixture(name='torch')
def _torch(monkeypatch):
  """A stand-in for PyTorch; what `load` returns is its attribute `content`."""
  allowed = []

  @contextlib.contextmanager
  def safe_globals(names):
    allowed.extend(names)
    yield

  def load(path, *, map_location, weights_only, mmap):
    # With weights_only the loader makes tensors and what was allowed, and runs nothing else.
    assert weights_only is True and map_location == 'cpu' and mmap
    if isinstance(module.content, Exception):
      raise module.content
    return module.content

  module = types.SimpleNamespace(
    load=load, Tensor=_Tensor, serialization=types.SimpleNamespace(safe_globals=safe_globals)
  )
  monkeypatch.setitem(sys.modules, 'torch', module)
  yield module
  assert set(allowed) <= {argparse.Namespace}


def _pth(path, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', b'')
  return path


@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'model': x, 'epoch': 3}])
def test_a_pth_is_read_by_the_loader_of_tensors_alone(tmp_path, torch, wrap):
  torch.content = wrap({name: _Tensor(np.asarray(x)) for name, x in ARRAYS.items()})
  read = _read(_pth(tmp_path / 'x.pth'))
  assert read.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
  'content, message',
  [
    (
      pickle.UnpicklingError('Set weights_only=False.\nUnsupported: GLOBAL posix.system was'),
      r'holds more than tensors, or is damaged \(it names posix.system\)',
    ),
    (RuntimeError('PytorchStreamReader failed\nmore'), r'\(PytorchStreamReader failed\)'),
    ([1, 2], 'holds a list'),
    ({FIRST: 'text'}, 'is no tensor'),
    ({FIRST: _Tensor(np.int32([1]))}, 'is no tensor of floating'),
    ({3: _Tensor(_FLOATS)}, 'no array'),
  ],
)
def test_what_a_pth_may_not_hold(tmp_path, torch, content, message):
  torch.content = content
  with pytest.raises(UserError, match=message) as e:
    _read(_pth(tmp_path / 'x.pth'))
  assert '\n' not in str(e.value)


def test_a_pth_that_torch_did_not_write_is_not_loaded(tmp_path, torch):
  torch.content = AssertionError('loaded')
  with pytest.raises(UserError, match='compressed'):
    _read(_pth(tmp_path / 'x.pth', zipfile.ZIP_DEFLATED))
  (tmp_path / 'y.pth').write_bytes(pickle.dumps({}))
  with pytest.raises(UserError, match='zip format'):
    _read(tmp_path / 'y.pth')
