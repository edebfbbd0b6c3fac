"""Image-text pairs from a TensorFlow Datasets (TFDS) data set, prepared as array_record.

No TensorFlow: TFDS only finds the files and says what the features are; the records are read by
array_record and parsed as the protocol buffers that they are, images left encoded.
"""

import concurrent.futures
import hashlib

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.proto import tf_example_pb2

from dpcap.data.contents import PreparedRecords
from dpcap.data.source import BadRecord, Record
from dpcap.errors import UserError
from dpcap.key import GIVEN, Key

# Storage sets the pace where files are opened.
_THREADS = 32


class TfdsSource:
  """A source over one split of a prepared data set; see `dpcap.data.source.Source`.

  Args:
    dataset: 'NAME', 'NAME/CONFIG' or 'NAME/CONFIG:VERSION'.
    split: a TFDS split such as 'train' or 'train[:10%]'.
    data_dir: where data sets were prepared. None: TFDS's own default, ~/tensorflow_datasets.
    image_key: the image feature; nested ones are joined by '/'.
    caption_key: a text feature, or a sequence of texts, such as 'captions/text': of several
      captions training draws one for each step, evaluations take the first.
    label_key: the class label feature; None or a data set without it: label -1.
    caption_template: makes captions of class names instead, for example 'a photo of a {}'.

  Attributes:
    class_names: the names of the label feature.
    fingerprint: of data set, version, split and feature keys, and sizes and times of its files.

  Raises:
    UserError: the data set is not prepared, not as array_record or not completely; a file is
      damaged or holds not as many records as the data set says; the split or a feature is unknown
      or of another kind.
  """

  KEYS = {
    'dataset': Key(str, '', 'name[/config][:version], prepared as array_record', check=GIVEN),
    'split': Key(str, 'train', 'split, in the TFDS slicing language'),
    'data_dir': Key(str, None, 'None: the TFDS default', optional=True),
    'image_key': Key(str, 'image', 'feature with the image'),
    'caption_key': Key(str, None, 'feature with the caption', optional=True),
    'label_key': Key(str, 'label', 'feature with the label', optional=True),
    'caption_template': Key(
      str, None, "caption made from the label, as 'a photo of a {}'", optional=True
    ),
  }

  def __init__(
    self,
    dataset: str,
    split: str,
    data_dir: str | None = None,
    image_key: str = 'image',
    caption_key: str | None = None,
    label_key: str | None = 'label',
    caption_template: str | None = None,
  ):
    builder = _find(dataset, data_dir)
    features = _flatten(builder.info.features)
    _check(dataset, 'image_key', image_key, features, tfds.features.Image)
    if caption_key is not None:
      _check(dataset, 'caption_key', caption_key, features, tfds.features.Text)
    # 'label' is only a default: a captioning data set need not have one.
    if label_key == 'label' and 'label' not in features and caption_template is None:
      label_key = None
    self.class_names: tuple[str, ...] = ()
    if label_key is not None:
      _check(dataset, 'label_key', label_key, features, tfds.features.ClassLabel)
      self.class_names = tuple(features[label_key].names)
    if caption_template is not None:
      if caption_key is not None or not self.class_names or '{}' not in caption_template:
        raise UserError(
          f'caption_template is {caption_template!r}; it must contain {{}}, and needs a label_key'
          f' (got {label_key!r}) and no caption_key (got {caption_key!r})'
        )
    self._image_key = image_key
    self._caption_key = caption_key
    self._label_key = label_key
    self._caption_template = caption_template
    self._dataset = dataset
    # array_record's own source holds file names only until it reads, so it pickles small.
    self._records, files = _open(builder, dataset, split)
    keys = (image_key, caption_key, label_key, caption_template)
    about = repr((builder.info.full_name, split, len(self._records), files, *keys))
    self.fingerprint = hashlib.sha256(about.encode()).hexdigest()
    self.contents = _contents(builder, split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    """Reads and parses one record; see `dpcap.data.source.Source`.

    Raises:
      BadRecord: the record is damaged, has no image or a label that is no class.
      IndexError: the index is out of range.
    """
    if not 0 <= index < len(self):
      raise IndexError(f'index {index} out of range: {self._dataset} holds {len(self)} records')
    try:
      example = tf_example_pb2.Example.FromString(self._records[index])
    except DecodeError as error:
      raise BadRecord(f'record is no tf.train.Example: {error}') from error
    except RuntimeError as error:
      # array_record has one exception for all: damage is the record's fault, a failing disk is not.
      if 'Corrupted' not in str(error):
        raise
      raise BadRecord(str(error)) from error
    feature = example.features.feature
    if not feature[self._image_key].bytes_list.value:
      raise BadRecord('no image')
    label = -1
    if self._label_key is not None and feature[self._label_key].int64_list.value:
      label = feature[self._label_key].int64_list.value[0]
      if not -1 <= label < len(self.class_names):  # TFDS itself writes -1 for unlabelled splits
        raise BadRecord(f'label {label} is none of the {len(self.class_names)} classes')
    caption = None
    if self._caption_template is not None and label >= 0:
      caption = self._caption_template.replace('{}', self.class_names[label])
    elif self._caption_key is not None:
      # A sequence is stored flat under its own key, a sequence of sequences under a longer one.
      nested = feature[f'{self._caption_key}/ragged_flat_values']
      caption = list(feature[self._caption_key].bytes_list.value or nested.bytes_list.value)
    return Record(image=feature[self._image_key].bytes_list.value[0], caption=caption, label=label)


def _find(name: str, data_dir: str | None):
  place = data_dir or '~/tensorflow_datasets'
  try:
    # tfds.builder() would import the code that downloads the data set, with TensorFlow under it.
    return read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    raise UserError(
      f'TFDS data set {name!r}: not found in {place};'
      f' expected it prepared there, as by `tfds build --file_format=array_record`'
    ) from error
  except Exception as error:  # ValueError, AssertionError, OSError, JSON and protocol buffer errors
    reason = str(error).partition('\n')[0]
    raise UserError(
      f'TFDS data set {name!r}: cannot be opened in {place} ({type(error).__name__}: {reason});'
      f' expected NAME[/CONFIG][:VERSION], prepared by `tfds build --file_format=array_record`'
    ) from error


def _open(builder, name: str, split: str):
  formats = builder.info.available_file_formats()
  if tfds.core.FileFormat.ARRAY_RECORD not in formats:
    prepared_as = ', '.join(sorted(format.value for format in formats)) or 'nothing'
    raise UserError(
      f'TFDS data set {name!r}: prepared as {prepared_as} in {builder.data_dir};'
      f' expected array_record (see `tfds build --file_format` and `tfds convert_format`)'
    )
  try:
    source = builder.as_data_source(
      split,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
  except ValueError as error:
    splits = ', '.join(f'{key} ({info.num_examples})' for key, info in builder.info.splits.items())
    raise UserError(
      f'TFDS data set {name!r}: split {split!r} is unknown or empty;'
      f' available: {splits}, and slices of them'
    ) from error
  instructions = builder.info.splits[split].file_instructions
  present = {path.name: path for path in builder.data_path.iterdir()}
  missing = [i.filename for i in instructions if i.basename() not in present]
  if missing:
    raise UserError(
      f'TFDS data set {name!r}: {len(missing)} of {len(instructions)} files missing,'
      f' first {missing[0]}'
    )
  # N is what the data set says of itself: it has to be true.
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for instruction, found in zip(instructions, pool.map(_count_records, instructions)):
      if found != instruction.examples_in_shard:
        raise UserError(
          f'TFDS data set {name!r}: {instruction.filename} holds {found}, but dataset_info.json'
          f' says {instruction.examples_in_shard:,} records; copy or prepare the data set again'
        )
  states = [(i.basename(), present[i.basename()].stat()) for i in instructions]
  return source.data_source, [(name, state.length, state.mtime) for name, state in states]


def _count_records(instruction) -> int | str:
  """The number of records in a file, or what is wrong with it."""
  try:
    reader = array_record_module.ArrayRecordReader(instruction.filename)
    try:
      return reader.num_records() if reader.ok() else 'nothing that can be read (damaged or cut)'
    finally:
      reader.close()
  except (RuntimeError, ValueError) as error:
    return f'nothing that can be read ({str(error).partition(chr(10))[0]})'


def _contents(builder, split: str) -> PreparedRecords:
  infos = builder.info.splits.items()
  splits = [(name, info.shard_lengths, info.num_bytes) for name, info in infos]
  return PreparedRecords(
    builder.info.full_name,
    hashlib.sha256(repr(sorted(splits)).encode()).hexdigest()[:16],
    tuple(
      (i.basename(), i.skip, i.skip + i.take)
      for i in builder.info.splits[split].file_instructions
    ),
  )


def _flatten(features, prefix: str = '') -> dict[str, object]:
  """Maps 'outer/inner' to the feature of that name; a sequence counts as its element."""
  while isinstance(features, (tfds.features.Sequence, tfds.features.Dataset)):
    features = features.feature
  if not isinstance(features, tfds.features.FeaturesDict):
    return {prefix: features}
  return {
    key: leaf
    for name, feature in features.items()
    for key, leaf in _flatten(feature, f'{prefix}/{name}' if prefix else name).items()
  }


def _check(name: str, option: str, key: str, features: dict[str, object], kind: type) -> None:
  if not isinstance(features.get(key), kind):
    found = f'of kind {type(features[key]).__name__}' if key in features else 'no feature of it'
    allowed = sorted(other for other, feature in features.items() if isinstance(feature, kind))
    raise UserError(
      f'TFDS data set {name!r}: {option} is {key!r}, which is {found};'
      f' expected {kind.__name__}, one of: {", ".join(allowed) or "none there"}'
    )
