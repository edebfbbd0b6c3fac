import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from dpcap.data.source import BadRecord, choose_caption
from dpcap.data.tfds_source import TfdsSource
from dpcap.errors import UserError

FEATURES = {
  'image': tfds.features.Image(shape=(None, None, 3)),
  'label': tfds.features.ClassLabel(names=['ant', 'bee', 'cat']),
  'title': tfds.features.Text(),
  'captions': tfds.features.Sequence({'id': np.int64, 'text': tfds.features.Text()}),
  'nested': {'view': tfds.features.Image(shape=(None, None, 3))},
}


def jpeg(i: int) -> bytes:
  file = io.BytesIO()
  Image.new('RGB', (8, 8), (i, 0, 0)).save(file, 'JPEG')
  return file.getvalue()


def example(i: int) -> bytes:
  """What TFDS's own writer stores, which needs TensorFlow: a tf.train.Example with flat keys."""
  message = tf_example_pb2.Example()
  feature = message.features.feature
  feature['image'].bytes_list.value.append(jpeg(i))
  feature['nested/view'].bytes_list.value.append(jpeg(100 + i))
  feature['label'].int64_list.value.append(i % 3)
  feature['title'].bytes_list.value.append(f'title {i}'.encode())
  feature['captions/id'].int64_list.value.extend(range(i))
  feature['captions/text'].bytes_list.value.extend(f'caption {i} {j}'.encode() for j in range(i))
  return message.SerializeToString()


def prepare(data_dir, name='pairs', features=FEATURES, records=None, file_format='array_record'):
  """Writes a data set with splits train (two files) and test (one), as `tfds build` would lay it out."""
  folder = data_dir / name / '1.0.0'
  folder.mkdir(parents=True)
  records = records or [example(i) for i in range(8)]
  splits = []
  for split, shards in {'train': [records[:3], records[3:5]], 'test': [records[5:]]}.items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix=file_format
    )
    for path, shard in zip(template.sharded_filepaths(len(shards)), shards):
      writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for record in shard:
        writer.write(record)
      writer.close()
    lengths = [len(shard) for shard in shards]
    splits.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=1, filename_template=template
      )
    )
  version = tfds.core.Version('1.0.0')
  identity = tfds.core.DatasetIdentity(
    name=name, version=version, data_dir=str(folder), module_name=''
  )
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  info.set_file_format(file_format)
  info.set_splits(tfds.core.splits.SplitDict(splits))
  info.write_to_directory(folder)
  return folder


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('tfds')
  prepare(data_dir)
  return str(data_dir)


def test_records(data_dir):
  source = TfdsSource('pairs', 'train', data_dir, caption_key='title')
  assert len(source) == 5 and source.class_names == ('ant', 'bee', 'cat')
  for i, record in enumerate(source):
    assert record == {'image': jpeg(i), 'caption': [f'title {i}'.encode()], 'label': i % 3}
  for i in (-1, 5):
    with pytest.raises(IndexError):
      source[i]


def test_names_and_splits(data_dir):
  assert len(TfdsSource('pairs:1.0.0', 'test', data_dir)) == 3
  source = TfdsSource('pairs', 'train[40%:]', data_dir)
  assert [record['image'] for record in source] == [jpeg(2), jpeg(3), jpeg(4)]
  assert len(TfdsSource('pairs', 'train+test', data_dir)) == 8


def test_several_captions_of_an_image(data_dir):
  source = TfdsSource('pairs', 'train', data_dir, caption_key='captions/text', label_key=None)
  assert [record['caption'] for record in source] == [
    [f'caption {i} {j}'.encode() for j in range(i)] for i in range(5)
  ]
  assert source.class_names == () and source[1]['label'] == -1
  assert choose_caption(source[3]['caption']) == 'caption 3 0'
  with pytest.raises(BadRecord, match='no caption'):
    choose_caption(source[0]['caption'])


def test_nested_image_and_caption_template(data_dir):
  source = TfdsSource(
    'pairs', 'train', data_dir, image_key='nested/view', caption_template='a photo of a {}'
  )
  assert source[1] == {'image': jpeg(101), 'caption': 'a photo of a bee', 'label': 1}
  assert TfdsSource('pairs', 'train', data_dir)[1]['caption'] is None


def test_a_data_set_without_labels(tmp_path):
  prepare(tmp_path, features={key: FEATURES[key] for key in ('image', 'title')})
  source = TfdsSource('pairs', 'train', str(tmp_path), caption_key='title')
  assert source.class_names == () and source[2]['label'] == -1


def test_damaged_records_are_bad_records(tmp_path):
  folder = prepare(tmp_path, records=[b'\xff\xff', b'', *(example(i) for i in range(6))])
  with open(folder / 'pairs-train.array_record-00001-of-00002', 'r+b') as file:
    file.seek(200)  # inside the first record of that file
    file.write(b'\xa5' * 50)
  source = TfdsSource('pairs', 'train', str(tmp_path))
  assert len(source) == 5
  for i in (0, 1, 3):
    with pytest.raises(BadRecord):
      source[i]
  assert source[2]['image'] == jpeg(0) and source[4]['image'] == jpeg(2)


def test_labels_beyond_the_classes(tmp_path):
  records = [example(i) for i in range(8)]
  for i, label in enumerate([-1, 7]):
    message = tf_example_pb2.Example.FromString(records[i])
    message.features.feature['label'].int64_list.value[0] = label
    records[i] = message.SerializeToString()
  prepare(tmp_path, records=records)
  source = TfdsSource('pairs', 'train', str(tmp_path), caption_template='a {}')
  assert source[0]['label'] == -1 and source[0]['caption'] is None
  with pytest.raises(BadRecord, match='label 7'):
    source[1]


def test_pickles_small_also_after_reading(data_dir):
  source = TfdsSource('pairs', 'train', data_dir, caption_key='title')
  source[4]
  data = pickle.dumps(source)
  assert len(data) < 2000
  assert pickle.loads(data)[4] == source[4]


def test_the_fingerprint_is_of_the_files(tmp_path):
  folder = prepare(tmp_path)
  find = lambda split: TfdsSource('pairs', split, str(tmp_path)).fingerprint
  before = find('train'), find('test')
  assert (find('train'), find('test')) == before and before[0] != before[1]
  file = folder / 'pairs-train.array_record-00001-of-00002'
  state = file.stat()
  os.utime(file, (state.st_atime, state.st_mtime + 10))
  touched = find('train')
  assert touched != before[0] and find('test') == before[1]
  writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
  for _ in range(2):
    writer.write(os.urandom(2**17))
  writer.close()
  assert file.stat().st_size != state.st_size
  os.utime(file, (state.st_atime, state.st_mtime + 10))
  assert find('train') not in (touched, before[0])


def test_no_tensorflow_at_run_time(data_dir, tmp_path):
  """TensorFlow may be installed beside dpcap: this stand-in for it ends the process that imports it."""
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow' / '__init__.py').write_text('import os; os._exit(3)')
  program = (
    f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
    'from dpcap.data.tfds_source import TfdsSource\n'
    f"source = TfdsSource('pairs', 'train', {data_dir!r}, caption_key='captions/text')\n"
    "assert source[2]['caption'][0] == b'caption 2 0' and len(source[2]['image']) > 100\n"
  )
  subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.parametrize(
  'options, reason',
  [
    ({'dataset': 'nowhere'}, "'nowhere': not found in .*array_record"),
    ({'dataset': 'pairs:9.9.9'}, "'pairs:9.9.9': not found in"),
    ({'dataset': 'pairs/config'}, 'not found in'),
    ({'dataset': 'no such/name!'}, 'not found in|cannot be opened in'),
    ({'split': 'validation'}, r"split 'validation' is unknown or empty; available: .*test \(3\)"),
    ({'split': 'train[zz]'}, 'unknown or empty'),
    ({'split': 'train[:0]'}, 'unknown or empty'),
    (
      {'image_key': 'picture'},
      "'picture', which is no feature of it; expected Image, one of: image, nested/view",
    ),
    ({'image_key': 'title'}, "image_key is 'title', which is of kind Text"),
    (
      {'caption_key': 'captions'},
      "caption_key is 'captions'.*expected Text, one of: captions/text, title",
    ),
    ({'caption_key': 'captions/id'}, "caption_key is 'captions/id'"),
    ({'label_key': 'title'}, "label_key is 'title'.*ClassLabel, one of: label"),
    ({'label_key': 'class'}, "label_key is 'class', which is no feature"),
    ({'caption_template': 'a photo'}, "caption_template is 'a photo'"),
    ({'caption_template': 'a {}', 'label_key': None}, 'caption_template'),
    ({'caption_template': 'a {}', 'caption_key': 'title'}, 'caption_template'),
  ],
)
def test_wrong_options_are_refused_in_one_line(data_dir, options, reason):
  with pytest.raises(UserError, match=reason) as error:
    TfdsSource(**{'dataset': 'pairs', 'split': 'train', 'data_dir': data_dir} | options)
  assert '\n' not in str(error.value)


def test_unfit_preparations_are_refused(tmp_path):
  prepare(tmp_path, name='records', file_format='tfrecord')
  with pytest.raises(
    UserError, match="'records': prepared as tfrecord in .*; expected array_record"
  ):
    TfdsSource('records', 'train', str(tmp_path))
  folder = prepare(tmp_path)
  lost = folder / 'pairs-train.array_record-00001-of-00002'
  lost.unlink()
  with pytest.raises(UserError, match=f'1 of 2 files missing, first .*{lost.name}'):
    TfdsSource('pairs', 'train', str(tmp_path))
  assert len(TfdsSource('pairs', 'test', str(tmp_path))) == 3
  (folder / 'features.json').write_text('{')
  with pytest.raises(UserError, match='cannot be opened in') as error:
    TfdsSource('pairs', 'test', str(tmp_path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'damage, found',
  [
    (lambda content: content[: len(content) // 2], 'nothing that can be read'),
    (lambda content: content[:-1], 'nothing that can be read'),
    (lambda content: content[:10], 'nothing that can be read'),
    (lambda content: b'', 'nothing that can be read'),
    (lambda content: b'<html>403 Forbidden</html>' * 10_000, 'nothing that can be read'),
    (None, '2'),
  ],
  ids=['half', 'last byte', 'ten bytes', 'empty', 'error page', 'another file'],
)
def test_files_must_hold_what_the_data_set_says(tmp_path, damage, found):
  folder = prepare(tmp_path)
  first, second = (folder / f'pairs-train.array_record-0000{i}-of-00002' for i in range(2))
  content = damage(first.read_bytes()) if damage else second.read_bytes()
  first.write_bytes(content)
  with pytest.raises(UserError, match=f'{first.name} holds {found}.* says 3 records') as error:
    TfdsSource('pairs', 'train', str(tmp_path))
  assert '\n' not in str(error.value)
  assert len(TfdsSource('pairs', 'test', str(tmp_path))) == 3


@pytest.mark.parametrize('said', [['3', '1'], ['4', '2'], ['3', '2', '0']])
def test_a_data_set_that_counts_otherwise_is_refused(tmp_path, said):
  info = prepare(tmp_path) / 'dataset_info.json'
  description = json.loads(info.read_text())
  (train,) = (split for split in description['splits'] if split['name'] == 'train')
  train['shardLengths'] = said
  info.write_text(json.dumps(description))
  with pytest.raises(UserError, match='records; copy or prepare|files missing'):
    TfdsSource('pairs', 'train', str(tmp_path))
