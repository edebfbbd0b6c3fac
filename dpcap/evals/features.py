"""Features of labelled images: the model's, an untrained model's, or the images' own.

They are kept on disk, for evaluations share images and may be stopped. Features of the private
data are as private as the data: files can be read by their owner only.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from dpcap import data
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals.hog import hog
from dpcap.evals.subject import Subject

_OF_MODELS = ('model', 'untrained')
# Those that no model has a part in: uint8 images (B, H, W, 3) -> (B, D).
_OF_IMAGES = {
  'pixels': lambda images: data.normalize(images).reshape(len(images), -1),
  'hog': lambda images: hog(images.astype(np.float32)),
}
FEATURES = (*_OF_MODELS, *_OF_IMAGES)
_BATCHES_PER_FILE = 64


class Choice(NamedTuple):
  """Which features are meant.

  Attributes:
    features: one of FEATURES.
    layers: one of the model's own LAYERS; None of what is not of a model.
  """

  features: str
  layers: str | None


class Labelled(NamedTuple):
  """Features (n, d) float32 of n images, their labels (n,) and places in the source (n,)."""

  features: np.ndarray
  labels: np.ndarray
  numbers: np.ndarray


class Pair(NamedTuple):
  """What is learnt from and what is judged on; labels are places in `classes`."""

  train: Labelled
  test: Labelled
  classes: tuple[str, ...]


def choose(
  evaluator: str, model: nn.Module | type[nn.Module], features: str, layers: str | None
) -> Choice:
  """The features that an evaluator's options mean.

  Args:
    evaluator: its name, for the error.
    model: the module or its class, which lists what it has under LAYERS.
    features: one of FEATURES.
    layers: one of the model's own; None: its first.

  Raises:
    UserError: if the model has no such features, or layers of what is not of a model are asked for.
  """
  if features not in _OF_MODELS:
    if layers is not None:
      raise UserError(
        f'{evaluator}: layers is {layers!r}; features={features} has none, leave it None'
      )
    return Choice(features, None)
  if layers is not None and layers not in model.LAYERS:
    name = (model if isinstance(model, type) else type(model)).__name__
    raise UserError(
      f'{evaluator}: layers is {layers!r}; those of the {name} are {", ".join(model.LAYERS)}'
    )
  return Choice(features, layers or model.LAYERS[0])


def extract_pair(
  subject: Subject, evaluator: str, train: Any, test: Any, choice: Choice, batch_size: int
) -> Pair:
  """Features of two source sections; see `make_pair` and `extract`."""
  sources = make_pair(subject, evaluator, train, test)
  parts = [extract(subject, source, choice, batch_size) for source in sources]
  return checked_pair(evaluator, *parts, sources[0].class_names)


def make_pair(
  subject: Subject, evaluator: str, train: Any, test: Any
) -> tuple[data.Source, data.Source]:
  """The two sources, which must have the same classes.

  Raises:
    UserError: if a source has no labels, they have different classes, or are the same.
  """
  if train == test:
    raise UserError(f'{evaluator}: train and test are the same source; give two splits')
  sources = {'train': subject.make_source(train), 'test': subject.make_source(test)}
  for name, source in sources.items():
    if not source.class_names:
      raise UserError(f'{evaluator}: the {name} source has no labels; give it a label_key')
  classes, others = (source.class_names for source in sources.values())
  if classes != others:
    different = sorted(set(classes) ^ set(others))
    raise UserError(
      f'{evaluator}: the train and test sources have different classes:'
      f' {", ".join(different[:5]) or "the same names in another order"}'
    )
  return sources['train'], sources['test']


def checked_pair(evaluator: str, train: Labelled, test: Labelled, classes: tuple[str, ...]) -> Pair:
  """The pair, in which every class of the test images has training images.

  Raises:
    UserError: if it has not, or there are no images.
  """
  if not len(train.labels) or not len(test.labels):
    raise UserError(f'{evaluator}: the train or test source has no usable labelled image')
  missing = [classes[i] for i in np.setdiff1d(test.labels, train.labels)]
  if missing:
    more = f' and {len(missing) - 5} more' if len(missing) > 5 else ''
    raise UserError(
      f'{evaluator}: the train source has no usable image of {", ".join(missing[:5])}{more}, the'
      ' test source has; is it the right split?'
    )
  return Pair(train, test, tuple(classes))


def make_embed(subject: Subject, choice: Choice) -> Callable[[Any, np.ndarray], jax.Array]:
  """The compiled function (variables, images (B, H, W, 3) uint8) -> features (B, d)."""

  # Variables are arguments: as constants they would be compiled into the program.
  @jax.jit
  def embed(variables, images):
    if choice.features in _OF_IMAGES:
      return _OF_IMAGES[choice.features](images)
    images = data.normalize(images)
    return subject.model.apply(variables, images, layers=choice.layers, method='features')

  return embed


def extract(subject: Subject, source: data.Source, choice: Choice, batch_size: int) -> Labelled:
  """Features and labels of all usable labelled images of a source, from the cache if there.

  What was kept of an extraction that was cut off is used; files that are damaged are not.

  Args:
    subject: the model; its `cache` is where features are kept, None: nowhere.
    source: labelled images.
    choice: which features.
    batch_size: images at a time.

  Returns:
    n leaves out images that cannot be decoded and examples without a label.
  """
  variables = subject.untrained if choice.features == 'untrained' else subject.variables
  batches = data.EvaluationBatches(source, subject.transform, batch_size)
  embed = make_embed(subject, choice)

  def compute(batch):
    keep = np.flatnonzero(batch.labels >= 0)
    features = embed(variables, batches_lib.spread(batch.images, batch_size))
    return Labelled(np.asarray(features, np.float32)[keep], batch.labels[keep], batch.numbers[keep])

  parts, waiting = _Parts(subject, source, choice, batch_size), []
  done = len(parts.kept) * _BATCHES_PER_FILE
  title = f'features of {choice.features}'
  for part in batches_lib.each(subject, title, batches, compute, start=done):
    waiting.append(part)
    if len(waiting) == _BATCHES_PER_FILE:
      parts.add(waiting)
      waiting = []
  if waiting:
    parts.add(waiting)
  return _join(parts.kept)


def _join(parts: list[Labelled]) -> Labelled:
  if not parts:
    return Labelled(np.zeros((0, 0), np.float32), np.zeros(0, int), np.zeros(0, int))
  return Labelled(*map(np.concatenate, zip(*parts)))


class _Parts:
  """The features of one source in files of _BATCHES_PER_FILE batches each, one after the other.

  Attributes:
    kept: what is known so far; all files from the first one up to one that is missing.
  """

  def __init__(self, subject: Subject, source: data.Source, choice: Choice, batch_size: int):
    self.kept: list[Labelled] = []
    self._folder = None
    if subject.cache is None:
      return
    about = {
      'variables': None if choice.features in _OF_IMAGES else _digest(subject, choice.features),
      **choice._asdict(),
      'model': str(subject.model),
      'image_size': subject.transform.image_size,
      'source': [type(source).__name__, source.fingerprint, len(source)],
      'labels': [getattr(source, 'label', None), source.class_names],
      'batches': [batch_size, _BATCHES_PER_FILE],
    }
    text = json.dumps(about, indent=2, default=str)
    self._folder = subject.cache / hashlib.sha256(text.encode()).hexdigest()[:32]
    # One by one: `parents` would make the cache itself, readable by others.
    subject.cache.parent.mkdir(parents=True, exist_ok=True)
    for folder in (subject.cache, self._folder):
      folder.mkdir(mode=0o700, exist_ok=True)
      folder.chmod(0o700)
    (self._folder / 'about.json').write_text(text + '\n')
    # All processes must go on from the same one; they may see a shared disk at different times.
    known = batches_lib.exchange(self._read())[0]
    self.kept = list(known)

  def _read(self) -> list[Labelled]:
    parts = []
    if jax.process_index() == 0:
      with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        while True:
          with np.load(self._path(len(parts)), allow_pickle=False) as file:
            parts.append(Labelled(*(file[name] for name in Labelled._fields)))
    return parts

  def add(self, parts: list[Labelled]) -> None:
    """The next file."""
    part = _join(parts)
    if self._folder is not None and jax.process_index() == 0:
      path = self._path(len(self.kept))
      temporary = path.with_suffix('.tmp')
      try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'wb') as file:
          np.savez(file, **part._asdict())
        temporary.replace(path)
      except OSError as e:
        raise UserError(f'{path}: features cannot be kept ({e.strerror})') from e
    self.kept.append(part)

  def _path(self, number: int) -> pathlib.Path:
    return self._folder / f'{number:06d}.npz'


def _digest(subject: Subject, features: str) -> str:
  digest = hashlib.sha256()
  variables = subject.untrained if features == 'untrained' else subject.variables
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()
