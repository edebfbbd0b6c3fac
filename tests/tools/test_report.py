"""The pages about a run: self-contained, escaped, true to the files, and apart by privacy."""

import html
import json
import math
import pathlib
import re

import numpy as np
import pytest

from dpcap import config as config_lib
from dpcap import data, privacy
from dpcap.errors import UserError
from tests import checkpoint_files, tiny
from tools import report
from tools.report_parts import captions, class_map, page, probes
from tools.report_parts.run import read_run

CLASSES = ['red', 'blue', '<b>&"green"']
METRICS = [
  {'step': 500, 'epsilon': 6.5, 'learning_rate': 0.001, 'images_per_second': 91.4},
  {'step': 1000, 'epsilon': 7.98765, 'learning_rate': 0.00025, 'images_per_second': 94.2},
]
DIAGNOSTICS = [
  {'step': 500, 'loss': 2.5, 'gradient_norm': 3.25, 'clip_fraction': 1.0},
  {'step': 1000, 'loss': 1.6789, 'gradient_norm': 2.75, 'clip_fraction': 0.875},
]
PRIVATE_FIGURES = ('1.6789', '2.75 at step', '87.5%')


def write_run(
  workdir, statement=(), change=lambda config: None, metrics=None, diagnostics=None, evals=None
):
  """A small workdir of 'micro' on scenes; `statement` is laid over the usual one."""
  config = tiny.get_config()
  config.privacy.update(noise_multiplier=None, epsilon=8.0)
  for name in ('private_features', 'raw_pixels', 'untrained'):
    config.evals[name] = config_lib.evaluator_config(
      'linear_probe', train=source('validation'), test=source('test')
    )
  config.evals.captions = config_lib.evaluator_config('captions', source=source('test'))
  change(config)
  usual = {
    'private': True,
    'unit': 'one image-text pair',
    'accountant': 'pld',
    'epsilon': {'rdp': 10.0366, 'pld': 7.98765},
    'delta': 1e-6,
    'noise_multiplier': 0.54321,
    'clip_norm': 1.25,
    'dataset_size': 1000,
    'expected_batch_size': 100,
    'sampling_probability': 0.1,
    'steps': 1000,
    'not_covered': ['the <vocabulary>', 'other runs'],
    'text': 'This model is <private>.',
  }
  workdir.mkdir(exist_ok=True)
  (workdir / 'config.json').write_text(config_lib.to_json(config))
  (workdir / 'privacy.json').write_text(json.dumps(usual | dict(statement)))
  for name, lines in (('metrics', metrics), ('diagnostics.private', diagnostics)):
    if lines:
      (workdir / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  for name, record in (evals or {}).items():
    (workdir / 'evals').mkdir(exist_ok=True)
    absent = {'train': name, 'test': name, 'source': {'name': 'scenes', 'split': 'none'}}
    options = config.evals[name].to_dict() if name in config.evals else absent
    record = {'name': name, 'checkpoint': '/elsewhere/1000', 'options': options} | PUBLIC | record
    (workdir / 'evals' / f'{name}.json').write_text(json.dumps(record))
  return workdir


def scenes(split):
  return data.make_source('scenes', image_size=16, split=split, size=10)


def source(split, **options):
  return config_lib.source_config('scenes', split=split, size=10, **options)


def probe(features, value, interval, classes=CLASSES):
  per_class = dict(zip(classes, (0.111, 0.222)))  # the last one has no test image
  return {
    'metric': 'top1',
    'value': value,
    'n': 4321,
    'n_train': 9876,
    'interval95': interval,
    'features': features,
    'classes': classes,
    'per_class': per_class,
  }


PUBLIC = {
  'uses_training_data': False,
  'apart': {'declared': False, 'why': 'scenes of split train, and of test'},
  'fingerprints': [scenes('test').fingerprint],
}
EVALS = {
  'private_features': probe('model', 0.9123, [0.9012, 0.9234]),
  'raw_pixels': probe('pixels', 0.8567, [0.8456, 0.8678]),
  'captions': {
    'metric': 'exact_match',
    'value': 0.5,
    'n': 2,
    'captions': [
      {'index': 0, 'written': 'a red cross', 'given': 'a large red ring'},
      {'index': 1, 'written': '<i>x</i>', 'given': '<i>x</i>'},
    ],
  },
}
FULL = dict(metrics=METRICS, diagnostics=DIAGNOSTICS, evals=EVALS)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  return pages(tmp_path_factory.mktemp('run'), **FULL)


def pages(workdir, **files):
  return page.make_pages(read_run(write_run(workdir, **files)))


def public(workdir, **files):
  return pages(workdir, **files)['report.html']


def plain(text):
  """What a reader sees, without tags."""
  text = re.sub(r'<style>.*?</style>|<svg.*?</svg>', ' ', text, flags=re.DOTALL)
  return ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', text)).split())


def verdicts(workdir, **files):
  groups = probes.comparable(read_run(write_run(workdir, **files)))
  return [probes.verdict(group) for group in groups]


def test_loads_nothing(full):
  for text in full.values():
    references = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', text)
    assert references and all(r.startswith(('data:image/', '#')) for r in references)
    assert not re.search(r'<script|<link|<iframe|@import', text)
    assert all(u.startswith('#') for u in re.findall(r'url\(([^)]*)\)', text))
    assert "default-src 'none'" in text


def test_figures_are_those_of_the_files(full):
  text = plain(full['report.html'])
  for figure in (
    '7.988',
    '10.037',
    '1 × 10 −6',
    '0.5432',
    '1.25',  # the statement
    '1,000 steps of 6 planned',
    'expected batch 100',
    '100 epochs',
    '1,000 records (scenes, train; one image-text pair each)',
    '91.2%',
    '90.1 – 92.3',
    '85.7%',
    '84.6 – 86.8',
    '33.3%',
    '4,321',
    '9,876',  # the probes
    '11.1%',
    '22.2%',
    '7.988 at step 1,000',
    '0.00025 at step',
    '94 at step',
    '50.0% of 2',
  ):
    assert figure in text, figure
  assert 'the <vocabulary>' in text and 'This model is <private>.' in text
  assert 'NO PRIVACY' not in text


def test_parameters_are_counted(full):
  words = len(pathlib.Path(data.SCENES_VOCABULARY).read_text().split())
  # micro, by hand: the encoder, its projection, the decoder, embedding and output.
  count = 6352 + 272 + 4224 + words * 16 + words * 17
  assert f'of {count:,} parameters' in full['report.html']


def test_diagnostics_are_on_the_private_page_only(full):
  assert list(full) == ['report.html', 'report.private.html']
  for figure in (*PRIVATE_FIGURES, 'Private: do not publish', 'shows private diagnostics'):
    assert figure in plain(full['report.private.html'])
    assert figure not in plain(full['report.html'])


def test_diagnostics_do_not_touch_the_public_page(full, tmp_path):
  without_time = lambda text: re.sub(r'Written [^.]*', '', text)
  (other,) = pages(tmp_path, **FULL | {'diagnostics': None}).values()
  assert without_time(other) == without_time(full['report.html'])


def test_names_are_escaped(full, tmp_path):
  hostile = '<script>alert(1)</script>'
  assert html.escape(CLASSES[2]) in full['report.html']

  def change(config):
    config.data.source = config_lib.source_config('tar_shards', path=hostile)

  text = public(
    tmp_path,
    statement={'text': hostile, 'not_covered': [hostile]},
    change=change,
    evals={
      'private_features': probe('model', 0.5, [0.4, 0.6], [hostile, 'b']),
      'a': probe('model', 0.5, [0.4, 0.6]) | {'name': hostile},
      'b': {'name': hostile, 'metric': hostile, 'value': 0.5, 'n': 2},
      'captions': EVALS['captions']
      | {
        'name': hostile,
        'captions': [
          {'index': 0, 'written': hostile, 'given': hostile + 'x', 'others': [hostile]}
        ],
      },
    },
  )
  assert '<script' not in text and text.count('&lt;script&gt;') > 8


def test_model_above_all_others(tmp_path, full):
  said = 'Private features is above every other probe: its interval starts at 90.1%'
  assert verdicts(tmp_path, evals=EVALS)[0].startswith(said)
  assert said in full['report.html']


@pytest.mark.parametrize(
  'value, interval, said',
  [
    (0.875, [0.86, 0.89], 'raw pixels cannot be told apart (85.7%)'),
    (0.84, [0.83, 0.85], 'raw pixels cannot be told apart (85.7%)'),
    (0.5, [0.49, 0.51], 'raw pixels is better (85.7%)'),
  ],
)
def test_model_not_above_says_so(tmp_path, value, interval, said):
  worse = probe('untrained', 0.1, [0.05, 0.15])
  own = {'private_features': probe('model', value, interval)}
  (verdict,) = verdicts(tmp_path, evals=EVALS | own | {'untrained': worse})
  assert 'is not above every other probe' in verdict and verdict.endswith(f': {said}.')


@pytest.mark.parametrize('role', ['train', 'test'])
def test_other_sources_are_not_compared(tmp_path, role):
  """Same classes, same numbers: only the config tells that the images differ."""

  def change(config):
    config.evals.raw_pixels[role].size = 11

  own, other = verdicts(tmp_path, evals=EVALS, change=change)
  assert own == 'Private features: nothing else was probed on the same train and test images.'
  assert other.startswith("Raw pixels: the model's features were not probed on the same")


def test_each_question_has_its_verdict(tmp_path):
  def change(config):
    for name in ('private_features', 'raw_pixels'):
      config.evals[f'{name}_count'] = config_lib.evaluator_config(
        'linear_probe',
        train=source('validation', label='count'),
        test=source('test', label='count'),
      )

  count = {
    'private_features_count': probe('model', 0.3, [0.2, 0.4]),
    'raw_pixels_count': probe('pixels', 0.35, [0.25, 0.45]),
  }
  color, counted = verdicts(tmp_path, evals=EVALS | count, change=change)
  assert 'Private features is above' in color and '(raw pixels)' in color
  assert 'Private features count (30.0%) is not above' in counted
  assert 'raw pixels count cannot' in counted


def test_probes_of_other_layers_are_not_compared_but_pixels_with_all(tmp_path):
  layers = ('memory', 'all_blocks', 'all_blocks')
  names = ('private_features', 'untrained', 'deep')

  def change(config):
    for name in names:
      config.evals[name] = config_lib.evaluator_config(
        'linear_probe', train=source('validation'), test=source('test')
      )

  probes_of = (
    probe('model', 0.9, [0.88, 0.92]),
    probe('untrained', 0.95, [0.94, 0.96]),
    probe('model', 0.87, [0.85, 0.89]),
  )
  found = {name: x | {'layers': of} for name, x, of in zip(names, probes_of, layers)}
  found |= {'raw_pixels': EVALS['raw_pixels'] | {'layers': None}}
  groups = probes.comparable(read_run(write_run(tmp_path, evals=found, change=change)))
  said = [[record['name'] for record in group] for group in groups]
  assert said == [['deep', 'untrained', 'raw_pixels'], ['private_features', 'raw_pixels']]
  assert [probes.features(record) for record in groups[0]] == [
    'model, all blocks',
    'untrained, all blocks',
    'pixels',
  ]


def test_other_metrics_have_a_table(tmp_path):
  aro = {'metric': 'accuracy', 'value': 0.625, 'n': 8, 'interval95': [0.3, 0.9], 'chance': 0.5}
  text = plain(public(tmp_path, evals={'aro': aro}))
  assert 'aro accuracy 62.5% 30.0 – 90.0 50.0% 8' in text


@pytest.mark.parametrize('count', [3, 13])
def test_confusion_has_a_picture(tmp_path, count):
  """Row i: three quarters of its images are right, the others are taken for the first class."""
  counts = 3 * np.eye(count, dtype=int)
  counts[:, 0] += 1
  classes = [f'<class {i}>' for i in range(count)]
  record = {'metric': 'top1', 'value': 0.8, 'n': 9, 'classes': classes}
  text = public(tmp_path, evals={'zero': record | {'confusion': counts.tolist()}})
  if count == 3:
    assert '&lt;class 1&gt; 25 75 0' in ' '.join(re.sub('<[^>]*>', ' ', text).split())
  else:
    assert f'alt="{count} classes"' in text
  assert 'class="confusion"' in text and '<class 1>' not in text


def test_retrieval_shows_what_was_found(tmp_path):
  images = scenes('test')
  record = {
    'metric': 'recall_at_1',
    'value': 0.5,
    'n': 9,
    'features': 'model',
    'evaluator': 'retrieval',
    'recall': {'1': {'value': 0.5}, '5': {'value': 0.8125}},
    'mean_average_precision': 0.375,
    'examples': [{'query': 7, 'nearest': [2, 4], 'same_class': [True, False]}],
    'options': {'source': {'name': 'scenes', 'split': 'test', 'size': 10, 'label': 'color'}},
  }
  text = public(tmp_path, evals={'like': record})
  same, other = (captions.image_uri(images[i]['image']) for i in (2, 4))
  assert f'<span class="same"><img class="crisp" src="{same}"' in text
  assert f'<span class="other"><img class="crisp" src="{other}"' in text
  assert captions.image_uri(images[7]['image']) in text
  assert '50.0% among the first 1, 81.2% among the first 5' in plain(text)
  changed = record | {'fingerprints': [scenes('train').fingerprint]}
  text = public(tmp_path, evals={'like': changed})
  assert 'the images have changed' in text and captions.image_uri(images[7]['image']) not in text
  record['options']['source']['split'] = 'none'
  assert 'Without images' in public(tmp_path, evals={'like': record})


def test_caption_retrieval_shows_both_ways(tmp_path):
  images = scenes('test')
  recall = lambda value: {'1': {'value': value, 'interval95': [0.1, 0.9], 'chance': 0.0625}}
  answers = lambda *found: [{'found': x, 'right': i == 0} for i, x in enumerate(found)]
  record = {
    'metric': 'text_recall_at_1',
    'value': 0.5,
    'n': 9,
    'distinct_captions': 16,
    'image_to_text': recall(0.5),
    'image_to_text_ratio': recall(0.625),
    'text_to_image': recall(0.375),
    'examples': {
      'images': [
        {
          'image': 7,
          'given': ['<a> ring'],
          'image_to_text': answers('<a> ring', 'a cross'),
          'image_to_text_ratio': answers('a blue ring'),
        }
      ],
      'captions': [{'caption': 'a <square>', 'text_to_image': answers(2, 4)}],
    },
    'options': {'source': {'name': 'scenes', 'split': 'test', 'size': 10, 'label': 'color'}},
  }
  text = public(tmp_path, evals={'found': record})
  right, wrong = (captions.image_uri(images[i]['image']) for i in (2, 4))
  assert f'<span class="same"><img class="crisp" src="{right}"' in text
  assert f'<span class="other"><img class="crisp" src="{wrong}"' in text
  assert captions.image_uri(images[7]['image']) in text
  said = plain(text)
  for direction in ('mean token loss 50.0%', 'over images 62.5%', 'by loss 37.5%'):
    assert f'{direction} 10.0 – 90.0 chance 6.25%' in said
  assert '9 images, 16 different captions' in said
  assert 'by loss <a> ring ✓ a cross by ratio a blue ring ✓' in said and 'a <square>' in said
  text = public(tmp_path, evals={'found': record | {'fingerprints': []}})
  assert 'the images have changed' in text and 'a cross' in text and right not in text


def test_classes_have_a_map(tmp_path):
  images = scenes('test')
  record = {
    'metric': 'top1',
    'value': 0.5,
    'n': 9,
    'evaluator': 'nearest_class_mean',
    'features': 'model',
    'layers': 'memory',
    'variance_explained': [0.5, 0.25],
    'map': [
      {'name': name, 'x': float(i), 'y': 0.5, 'count': 3, 'image': i}
      for i, name in enumerate(CLASSES)
    ],
    'options': {'source': {'name': 'scenes', 'split': 'test', 'size': 10, 'label': 'color'}},
  }
  text = public(tmp_path, evals={'concepts': record})
  for i, name in enumerate(CLASSES):
    assert f'href="{captions.image_uri(images[i]["image"])}"' in text
    assert f'{html.escape(name)}</text>' in text
  assert '50% and 25% of the variance' in plain(text)
  assert '<tr class="own"><th>concepts</th>' in text
  text = public(tmp_path, evals={'concepts': record | {'features': 'hog', 'layers': None}})
  assert '<tr><th>concepts</th>' in text and '(hog)' in text
  text = public(tmp_path, evals={'concepts': record | {'fingerprints': []}})
  assert 'the images have changed' in text and '<image' not in text and '>red</text>' in text
  nowhere = [entry | {'x': None} for entry in record['map']]
  text = public(tmp_path, evals={'concepts': record | {'map': nowhere}})
  assert 'the features are not finite' in text and '<svg viewBox' not in text
  many = [entry | {'count': i} for i, entry in enumerate(record['map'] * 51)]
  text = public(tmp_path, evals={'concepts': record | {'fingerprints': [], 'map': many}})
  assert text.count('</text>') == 150 and text.count('<circle') == 153


def test_names_on_a_map_make_room_for_each_other():
  """Also where all begin at one place."""
  rng = np.random.default_rng()
  sizes = np.stack([rng.uniform(30, 90, 100), np.full(100, 40.0)], axis=1)
  for places in (
    rng.uniform((200, 200), (800, 500), (100, 2)),
    rng.normal((528, 380), (120, 80), (100, 2)),
    np.full((100, 2), 300.0),
  ):
    centres = class_map.spread(places, sizes)
    low, high = centres - sizes / 2, centres + sizes / 2
    assert low.min() >= 0 and (high <= (1056, 760)).all()
    both = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    covered = np.prod(np.maximum(both, 0), axis=2)
    np.fill_diagonal(covered, 0)
    assert covered.sum() / 2 < 0.05 * np.prod(sizes, axis=1).sum()
  alone = class_map.spread(np.array([[500.0, 400.0], [700, 400]]), np.full((2, 2), 40.0))
  np.testing.assert_allclose(alone, [[500, 400], [700, 400]], atol=0.1)


def test_shots_and_guarantees_of_evaluations(tmp_path):
  shots = {str(k): {'value': v, 'interval95': [v, v]} for k, v in ((1, 0.25), (10, 0.625))}
  common = {'metric': 'top1', 'n': 9, 'features': 'model', 'chance': 0.1}
  text = plain(
    public(
      tmp_path,
      evals={
        'few': common | {'evaluator': 'few_shot', 'value': 0.625, 'shots': shots},
        'own': common
        | {'evaluator': 'private_probe', 'value': 0.5, 'privacy': {'text': 'epsilon <1>'}},
        'aro': common | {'evaluator': 'aro_scenes', 'value': 0.5, 'note': '3 of <9> were cut'},
      },
    )
  )
  assert '62.5% with 10 per class' in text and 'own. epsilon <1>' in text
  assert 'aro. 3 of <9> were cut' in text.replace('Aro.', 'aro.')
  assert 'above every other probe' not in text


def test_evaluations_in_training_are_curves(tmp_path):
  write_run(tmp_path, metrics=METRICS)
  # A series with a private result is private: the curve goes through it.
  for name, step, value, private in (
    ('secret', 20, 0.75, True),
    ('secret', 3, 0.5, False),
    ('open', 20, 0.625, False),
  ):
    folder = tmp_path / f'evals/step_{step}'
    folder.mkdir(parents=True, exist_ok=True)
    record = {'name': name, 'metric': 'top1', 'value': value, 'interval95': [value, value]}
    marks = PUBLIC | {'uses_training_data': private}
    (folder / f'{name}.json').write_text(json.dumps(record | marks))
  run = read_run(tmp_path)
  assert [record['step'] for record in run.evals_in_training['secret']] == [3, 20]
  texts = {name: plain(text) for name, text in page.make_pages(run).items()}
  assert 'open 62.5% at step 20' in texts['report.html']
  assert 'secret' not in texts['report.html']
  assert 'secret 75.0% at step 20' in texts['report.private.html']


@pytest.mark.parametrize(
  'marks',
  [
    {'uses_training_data': True},
    {'uses_training_data': None},
    {},
    {'uses_training_data': False},  # of a version that compared configs
    PUBLIC | {'uses_training_data': 'false'},
  ],
)
def test_only_what_is_marked_apart_is_on_the_public_page(tmp_path, marks):
  write_run(tmp_path, evals=EVALS)
  for name in ('captions', 'private_features'):
    path = tmp_path / f'evals/{name}.json'
    record = json.loads(path.read_text())
    bare = {key: value for key, value in record.items() if key not in PUBLIC} | marks
    path.write_text(json.dumps(bare | {'fingerprints': record['fingerprints']}))
    (tmp_path / 'evals/step_5').mkdir(exist_ok=True)
    (tmp_path / f'evals/step_5/{name}.json').write_text(json.dumps(bare | {'name': 'then'}))
  texts = page.make_pages(read_run(tmp_path))
  image = captions.image_uri(scenes('test')[0]['image'])
  for shown in (image, 'a large red', '91.2%', '<h2>Captions', 'then'):
    assert shown not in texts['report.html'], shown
    assert shown in texts['report.private.html'].replace('<u>large</u>', 'large'), shown
  assert '85.7%' in texts['report.html']


def test_nothing_to_show_is_said(tmp_path):
  private = EVALS['captions'] | {'uses_training_data': True}
  text = plain(public(tmp_path, evals={'captions': private}))
  assert 'has no evaluation that this page may show' in text


def test_images_that_changed_since_are_not_shown(tmp_path):
  """The marks, and the numbers of the images, are of the source that was evaluated."""
  other = {'fingerprints': [scenes('train').fingerprint]}
  text = public(tmp_path, evals={'captions': EVALS['captions'] | other})
  assert 'Without images: the images have changed since they were evaluated' in text
  assert 'data:image/png' not in text


def test_what_was_declared_is_said(tmp_path, full):
  declared = {'apart': {'declared': True, 'why': 'declared'}}
  text = plain(public(tmp_path, evals=EVALS | {'raw_pixels': EVALS['raw_pixels'] | declared}))
  assert 'that none of the training images was read for raw pixels.' in text
  assert 'Declared by' not in full['report.html']
  # Nor where it was declared that they were read.
  private = EVALS['raw_pixels'] | declared | {'uses_training_data': True}
  for text in pages(tmp_path, evals=EVALS | {'raw_pixels': private}).values():
    assert 'Declared by' not in text


def test_captions_mark_what_is_wrong():
  written, given = captions.mark_words('a red cross & more', 'a large red ring')
  assert written == 'a red <mark>cross &amp; more</mark>'
  assert given == 'a <u>large</u> red <u>ring</u>'
  assert captions.mark_words('', 'a b') == ('', '<u>a b</u>')


def test_images_are_those_of_the_source(full):
  images = scenes('test')
  for index in (0, 1):
    assert captions.image_uri(images[index]['image']) in full['report.html']
  assert captions.image_uri(np.zeros((300, 300, 3), np.uint8)).startswith('data:image/jpeg')


@pytest.mark.parametrize(
  'statement',
  [
    # A fixed seed: the accountant has a number, the run no guarantee.
    {'private': False},
    {'private': False, 'epsilon': {'pld': None}, 'clip_norm': None, 'noise_multiplier': 0.0},
  ],
)
def test_no_privacy(tmp_path, statement):
  text = plain(public(tmp_path, statement=statement, metrics=METRICS))
  assert 'NO PRIVACY' in text and '∞' in text and 'Epsilon spent' not in text
  assert '7.988' not in text and '10.037' not in text
  assert read_run(tmp_path).epsilon_text().startswith('NO PRIVACY')


def test_a_simulated_run_s_epsilon_is_named_as_such(tmp_path):
  simulates = {'epsilon': {'pld': 7.337, 'rdp': None}}
  text = plain(public(tmp_path, statement={'private': False, 'simulates': simulates}))
  assert 'NO PRIVACY' in text and '∞' in text
  assert 'of the simulated run 7.337 epsilon by PLD' in ' '.join(text.split())


def test_a_start_counts(tmp_path):
  foreign = privacy.foreign_statement('base.pth', 'ab', None)
  init = {'covered': False, 'composed': None, 'statement': foreign}
  uncovered = {'private': False, 'private_given_init': True, 'init': init}
  text = ' '.join(plain(public(tmp_path, statement=uncovered, metrics=METRICS)).split())
  assert 'NO PRIVACY' in text and '∞' in text and 'given its start 7.988 epsilon by PLD' in text
  first = {'private': True, 'epsilon': {'pld': 1.5}, 'delta': 1e-6}
  composed = {'epsilon': {'pld': 9.5, 'rdp': None}, 'delta': 2e-6}
  init = {'covered': True, 'composed': composed, 'statement': first}
  covered = {'private_given_init': True, 'init': init}
  text = ' '.join(plain(public(tmp_path, statement=covered)).split())
  assert 'differentially private' in text
  assert 'with its start, delta 2e-06 9.500 epsilon by PLD' in text
  told = read_run(tmp_path).epsilon_text()
  assert '7.988 by PLD; delta 1e-06; with its start epsilon 9.500 by PLD' in told
  # Nobody's data add nothing.
  init['statement'] = first | {'data': {'source': 'textures', 'generated': True}}
  assert 'with its start' not in plain(public(tmp_path, statement=covered))
  assert 'with its start' not in read_run(tmp_path).epsilon_text()


def test_epsilon_without_a_bound(tmp_path):
  run = read_run(write_run(tmp_path, statement={'epsilon': {'pld': None, 'rdp': 3.0}}))
  assert 'no finite bound' in plain(page.make_pages(run)['report.html'])
  assert run.epsilon_text() == 'epsilon no finite bound by PLD, 3.000 by RDP; delta 1e-06'


def test_missing_parts_are_said(tmp_path):
  text = plain(public(tmp_path))
  assert 'has no evaluation that this page may show' in text and 'metrics.jsonl has no finite value' in text


def test_values_that_are_not_finite(tmp_path):
  lines = [dict(DIAGNOSTICS[0], step=i, loss=loss) for i, loss in enumerate((math.nan, 3.5, None))]
  metrics = [METRICS[0] | {'epsilon': None, 'learning_rate': math.inf}]
  text = pages(tmp_path, metrics=metrics, diagnostics=lines)['report.private.html']
  assert '3.5000 at step 1' in plain(text) and 'Throughput' in text
  assert 'Epsilon spent' not in text and 'Learning rate' not in text


@pytest.mark.parametrize('model, unit', [('mlp', 'nats'), ('captioner', 'nats per token')])
def test_a_run_without_privacy_has_no_norms_and_its_model_says_what_its_loss_is_in(
  tmp_path, monkeypatch, model, unit
):
  def change(config):
    config.model, config.evals = config_lib.model_config(model), {}

  units, panel = {}, page.panel

  def noting(lines, curve, *target):
    units[curve.key] = curve.unit
    return panel(lines, curve, *target)

  monkeypatch.setattr(page, 'panel', noting)
  lines = [{'step': 4, 'loss': 3.5}]
  statement = {'private': False, 'epsilon': {'pld': None}}
  found = pages(tmp_path, statement=statement, change=change, diagnostics=lines)
  text = found['report.private.html']
  assert '3.5000 at step 4' in plain(text) and 'Gradient norm' not in plain(text)
  assert units['loss'] == unit


def test_weights_that_were_imported_are_no_run(tmp_path):
  write_run(tmp_path, statement={'origin': {'file': 'x.npz'}})
  with pytest.raises(UserError, match=f'{tmp_path}: holds weights that were imported'):
    read_run(tmp_path)


def test_the_vocabulary_may_be_elsewhere(tmp_path):
  def change(config):
    config.data.vocabulary = '/nonexistent/words.txt'

  text = plain(public(tmp_path, change=change))
  assert 'Image captioner (a ViT encoder of 1 layers' in text


@pytest.mark.parametrize('count, drawn', [(40, True), (41, False)])
def test_classes_are_drawn_up_to_a_number(tmp_path, count, drawn):
  record = probe('model', 0.5, [0.4, 0.6], [f'class {i}' for i in range(count)])
  assert ('by class' in public(tmp_path, evals={'private_features': record})) == drawn


@pytest.mark.parametrize(
  'name, content, said',
  [
    ('config.json', None, 'give the workdir of a run'),
    ('config.json', '{"model": {', 'not JSON'),
    ('config.json', '{"model": 3}', 'data is missing'),
    ('privacy.json', None, 'with a checkpoint'),
    ('privacy.json', '{"private', 'not JSON'),
    ('privacy.json', '', 'not JSON'),
    ('evals/captions.json', b'\xff\xfe', 'not JSON'),
  ],
)
def test_damage_is_refused(tmp_path, name, content, said):
  path = write_run(tmp_path, evals=EVALS) / name
  path.unlink()
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=said) as failure:
    read_run(tmp_path)
  assert name in str(failure.value)


def test_writes_and_prints(tmp_path, capsys):
  report.write_report(write_run(tmp_path, **FULL))
  printed = capsys.readouterr().out
  names = ('report.html', 'report.private.html')
  assert printed.splitlines()[-2:] == [str(tmp_path / name) for name in names]
  assert '91.2%' in printed and '7.988 by PLD' in printed and 'is above every' in printed
  texts = {name: (tmp_path / name).read_text() for name in names}
  assert [PRIVATE_FIGURES[0] in texts[name] for name in names] == [False, True]


def test_the_private_page_is_readable_by_the_owner_only(tmp_path):
  path = write_run(tmp_path, **FULL) / 'report.private.html'
  path.write_text('as an older version left it')
  path.chmod(0o666)
  report.write_report(tmp_path)
  assert path.stat().st_mode & 0o777 == 0o600
  assert PRIVATE_FIGURES[0] in path.read_text()


def test_the_statement_is_that_of_the_newest_whole_checkpoint(tmp_path):
  """A run was killed between its checkpoint and privacy.json, and is writing the next one."""
  write_run(tmp_path)
  stale = json.loads((tmp_path / 'privacy.json').read_text())
  for step, name in ((900, '900'), (1200, '1200'), (1300, '1300.orbax-checkpoint-tmp')):
    checkpoint_files.write(tmp_path / 'checkpoints' / name, stale | {'steps': step})
  assert read_run(tmp_path).statement['steps'] == 1200
  assert json.loads((tmp_path / 'privacy.json').read_text())['steps'] == 1200
  (tmp_path / 'checkpoints/1200/privacy/metadata').write_text('{"st')
  assert read_run(tmp_path).statement['steps'] == 900


def test_program_refuses_in_one_line(tmp_path, program):
  workdir = tmp_path / 'absent'
  process = program('tools.report', f'--workdir={workdir}')
  _, said = process.communicate()
  assert process.returncode == 2 and said.count('\n') == 1
  assert said.startswith(f'error: {workdir}/config.json: cannot be read')
