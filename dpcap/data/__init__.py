"""Where examples come from: sources, image operations, text, the batch pipeline."""

from dpcap.data.byte_ranges import StoreError
from dpcap.data.catalogue import DATASETS, Dataset, find_dataset, readable
from dpcap.data.contents import (
  GENERATED,
  Contents,
  Relation,
  compare,
  compare_kinds,
  known_apart,
)
from dpcap.data.drawn import DrawnSource
from dpcap.data.epochs import AugmentedBatches
from dpcap.data.examples import Example, Transform, unit
from dpcap.data.first_look import look_at
from dpcap.data.image import normalize
from dpcap.data.image_folder import ImageFolder, ImageList
from dpcap.data.loading import WORKER_TIMEOUT_S, iterate
from dpcap.data.pipeline import (
  Chunk,
  EvaluationBatches,
  EveryNth,
  LogicalBatches,
)
from dpcap.data.scenes import VOCABULARY_FILE as SCENES_VOCABULARY
from dpcap.data.scenes import Scenes
from dpcap.data.source import Source
from dpcap.data.tar_shards import TarShards
from dpcap.data.text import TOKENIZERS, Tokenizer, make_tokenizer
from dpcap.data.textures import VOCABULARY_FILE as TEXTURES_VOCABULARY
from dpcap.data.textures import Textures
from dpcap.data.tfds_source import TfdsSource
from dpcap.errors import UserError

__all__ = [
  'AugmentedBatches',
  'Chunk',
  'Contents',
  'DATASETS',
  'Dataset',
  'EvaluationBatches',
  'EveryNth',
  'Example',
  'GENERATED',
  'ImageFolder',
  'ImageList',
  'LogicalBatches',
  'Relation',
  'SCENES_VOCABULARY',
  'SOURCES',
  'Scenes',
  'Source',
  'StoreError',
  'TEXTURES_VOCABULARY',
  'TOKENIZERS',
  'TarShards',
  'Textures',
  'TfdsSource',
  'Tokenizer',
  'Transform',
  'WORKER_TIMEOUT_S',
  'compare',
  'compare_kinds',
  'find_dataset',
  'iterate',
  'known_apart',
  'look_at',
  'make_source',
  'make_tokenizer',
  'normalize',
  'readable',
  'unit',
]


# name in the config -> class, which says its own keys under KEYS
SOURCES = {
  'scenes': Scenes,
  'textures': Textures,
  'tar_shards': TarShards,
  'image_folder': ImageFolder,
  'tfds': TfdsSource,
}


def make_source(name: str, image_size: int, **options) -> Source:
  """The source of that name.

  Args:
    name: key of SOURCES.
    image_size: side in pixels, for sources that draw their images.
    **options: the source's own arguments.

  Raises:
    UserError: if the source refuses its arguments or its files.
  """
  source = SOURCES[name]
  if issubclass(source, DrawnSource):
    options['image_size'] = image_size
  try:
    return source(**options)
  except StoreError as e:
    raise UserError(f'{e.filename}: {e.strerror}') from e
