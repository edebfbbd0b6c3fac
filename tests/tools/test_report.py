"""The page about a run: self-contained, escaped, true to the files, and never broken by them."""

import html
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from dpcap import config as config_lib
from dpcap import data
from dpcap.errors import UserError
from tools import report

CLASSES = ['red', 'blue', '<b>&"green"']


def write_run(workdir, statement=(), config=(), metrics=None, diagnostics=None, evals=None):
  """A small workdir; `statement` and `config` (by 'section.key') are laid over the usual."""
  tree = config_lib.base_config()
  tree.model.size = 'demo'
  tree.data.image_size = 32
  tree.data.source = config_lib.source_config('scenes', split='train', size=1000)
  tree.privacy.epsilon = 8.0
  tree = json.loads(config_lib.to_json(tree))
  source = {'name': 'scenes', 'split': 'test', 'size': 10, 'label': 'color'}
  tree['evals'] = {'captions': {'name': 'captions', 'images': 2, 'source': source}}
  for key, value in dict(config).items():
    section, name = key.split('.')
    tree[section][name] = value
  usual = {
      'private': True, 'accountant': 'pld', 'epsilon': {'pld': 7.98765, 'rdp': 10.0366},
      'delta': 1e-6, 'noise_multiplier': 0.54321, 'clip_norm': 1.25, 'dataset_size': 1000,
      'expected_batch_size': 100, 'sampling_probability': 0.1, 'steps': 1000,
      'not_covered': ['the <vocabulary>', 'other runs'], 'text': 'This model is <private>.',
  }
  workdir.mkdir(exist_ok=True)
  (workdir / 'config.json').write_text(json.dumps(tree))
  (workdir / 'privacy.json').write_text(json.dumps(usual | dict(statement)))
  for name, lines in (('metrics', metrics), ('diagnostics.private', diagnostics)):
    if lines is not None:
      (workdir / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  for name, record in (evals or {}).items():
    (workdir / 'evals').mkdir(exist_ok=True)
    (workdir / 'evals' / f'{name}.json').write_text(json.dumps({'name': name} | record))
  return workdir


def probe(features, value, interval, **more):
  per_class = dict(zip(CLASSES, (0.111, 0.222, None)))
  return {
      'metric': 'top1', 'value': value, 'n': 4321, 'checkpoint': '/elsewhere/1000',
      'interval95': interval, 'features': features, 'classes': CLASSES, 'per_class': per_class,
  } | more


FULL = dict(
    metrics=[
        {'step': 500, 'epsilon': 6.5, 'learning_rate': 0.001, 'images_per_second': 91.4},
        {'step': 1000, 'epsilon': 7.98765, 'learning_rate': 0.00025, 'images_per_second': 94.2},
    ],
    diagnostics=[
        {'step': 500, 'loss': 2.5, 'gradient_norm': 3.25, 'clip_fraction': 1.0},
        {'step': 1000, 'loss': 1.6789, 'gradient_norm': 2.75, 'clip_fraction': 0.875},
    ],
    evals={
        'private_features': probe('model', 0.9123, [0.9012, 0.9234]),
        'raw_pixels': probe('pixels', 0.8567, [0.8456, 0.8678]),
        'captions': {
            'metric': 'exact_match', 'value': 0.5, 'n': 2,
            'captions': [
                {'index': 0, 'written': 'a red cross', 'given': 'a large red ring'},
                {'index': 1, 'written': '<i>x</i>', 'given': '<i>x</i>'},
            ],
        },
    },
)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  return report.make_page(report.read_run(write_run(tmp_path_factory.mktemp('run'), **FULL)))


def page(workdir, **files):
  return report.make_page(report.read_run(write_run(workdir, **files)))


def plain(text):
  """What a reader sees, without tags."""
  text = re.sub(r'<style>.*?</style>|<svg.*?</svg>', ' ', text, flags=re.DOTALL)
  return ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', text)).split())


def test_loads_nothing(full):
  references = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', full)
  assert references and all(r.startswith(('data:image/', '#')) for r in references)
  assert not re.search(r'<script|<link|<iframe|@import', full)
  assert all(u.startswith('#') for u in re.findall(r'url\(([^)]*)\)', full))
  assert "default-src 'none'" in full


def test_figures_are_those_of_the_files(full):
  text = plain(full)
  for figure in (
      '7.988', '10.037', '10 −6', '0.5432', '1.25',  # the statement
      '1,000 steps', 'expected batch 100', '100 epochs', '1,000 image–text pairs',
      '91.2%', '90.1 – 92.3', '85.7%', '84.6 – 86.8', '33.3%', '4,321',  # the probes
      '1.6789 at step 1,000', '2.75 at step', '87.5% at step', '0.00025 at step', '94 at step',
      'Exact match: 50.0% of 2',
  ):
    assert figure in text, figure
  assert 'the <vocabulary>' in text and 'This model is <private>.' in text
  assert '11.1' in full and '22.2' in full  # by class
  assert 'NO PRIVACY' not in text


def test_names_are_escaped(full, tmp_path):
  assert html.escape(CLASSES[2]) in full
  hostile = '<script>alert(1)</script>'
  text = page(
      tmp_path,
      statement=dict.fromkeys(('text', 'accountant', 'steps', 'delta'), hostile)
      | {'not_covered': [hostile], 'epsilon': {hostile: 8.0}},
      config={'model.size': hostile, 'data.source': {'name': hostile, 'split': hostile}},
      evals={
          'a': probe(hostile, 0.5, [0.4, 0.6], name=hostile, checkpoint=hostile),
          'b': {'metric': hostile, 'value': 1, 'n': hostile},
          'c': {'metric': hostile, 'captions': [dict.fromkeys(('written', 'given'), hostile)]},
      },
  )
  assert '<script' not in text and '&lt;script&gt;' in text


def test_model_above_all_others(full):
  assert 'Private features is above every other probe' in full


@pytest.mark.parametrize(
    'value, interval, said',
    [
        (0.875, [0.86, 0.89], 'raw pixels cannot be told apart (85.7%)'),
        (0.84, [0.83, 0.85], 'raw pixels cannot be told apart (85.7%)'),
        (0.5, [0.49, 0.51], 'raw pixels is better (85.7%)'),
    ],
)
def test_model_not_above_says_so(tmp_path, value, interval, said):
  evals = FULL['evals'] | {'private_features': probe('model', value, interval)}
  text = plain(page(tmp_path, evals=evals))
  assert 'is not above every other probe' in text and said in text


def test_other_test_sets_are_not_compared(tmp_path):
  evals = FULL['evals'] | {'raw_pixels': probe('pixels', 0.1, [0.0, 0.2], n=17)}
  assert 'no other probe on this test set' in page(tmp_path, evals=evals)


def test_captions_mark_what_is_wrong():
  written, given = report.mark_words('a red cross & more', 'a large red ring')
  assert written == 'a red <mark>cross &amp; more</mark>'
  assert given == 'a <u>large</u> red <u>ring</u>'
  assert report.mark_words('', 'a b') == ('', '<u>a b</u>')


def test_images_are_those_of_the_source(full):
  source = data.make_source('scenes', image_size=32, split='test', size=10)
  for index in (0, 1):
    assert report.image_uri(source[index]['image']) in full
  assert report.image_uri(np.zeros((300, 300, 3), np.uint8)).startswith('data:image/jpeg')


def test_no_privacy(tmp_path):
  # A fixed seed: the accountant has a number, the run no guarantee.
  text = plain(page(tmp_path, statement={'private': False}, metrics=FULL['metrics']))
  assert 'NO PRIVACY' in text and '∞' in text and 'Epsilon spent' not in text
  assert '7.988' not in text and '10.037' not in text


def test_infinite_epsilon(tmp_path):
  text = plain(page(tmp_path, statement={'epsilon': {'pld': None, 'rdp': math.nan}}))
  assert text.count('no finite bound') == 2


def test_missing_parts_are_said(tmp_path):
  text = plain(page(tmp_path, config={'train.diagnostics': False}))
  assert 'has not been evaluated' in text
  assert 'diagnostics were switched off' in text
  assert 'metrics.jsonl has no finite value' in text


def test_numbers_that_are_none(tmp_path):
  nan = math.nan
  line = {'step': 1, 'epsilon': None, 'learning_rate': nan, 'images_per_second': math.inf}
  text = page(
      tmp_path,
      statement={'delta': None, 'noise_multiplier': nan, 'clip_norm': None, 'steps': None},
      metrics=[line],
      diagnostics=[{'step': 1, 'loss': nan}, {'step': 2, 'loss': 3.5}, {'step': 3, 'loss': None}],
      evals={'a': probe('model', nan, [nan, None]), 'b': probe('pixels', None, None, n=None),
             'c': probe('model', 0.5, [0.4, 0.6], classes=None, per_class=None)},
  )
  assert '3.5000' in plain(text)
  assert not re.search(r'\b(nan|none|inf)\b', plain(text.split('<footer')[0]), re.IGNORECASE)


@pytest.mark.parametrize('count, drawn', [(40, True), (41, False)])
def test_classes_are_drawn_up_to_a_number(tmp_path, count, drawn):
  per_class = {f'class {i}': 0.5 for i in range(count)}
  record = probe('model', 0.5, [0.4, 0.6], classes=list(per_class), per_class=per_class)
  assert ('By class' in page(tmp_path, evals={'a': record})) == drawn


def test_long_captions_are_cut(tmp_path):
  entries = [{'index': 10**9, 'written': 'word ' * 5000, 'given': 'x' * 5000}, {}]
  text = page(tmp_path, evals={'captions': {'metric': 'exact_match', 'captions': entries}})
  assert len(plain(text)) < 20_000 and 'no image' in text


def test_captions_without_their_source(tmp_path):
  text = page(tmp_path, evals={'others': FULL['evals']['captions']})
  assert 'Without images: config.json has no evals.others.source' in text and '<img' not in text


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('config.json', None, 'not the workdir of a run'),
        ('config.json', '{"model": 3}', 'it lacks data.source.name'),
        ('config.json', '[1]', 'not a JSON object'),
        ('privacy.json', None, 'comes with the first checkpoint'),
        ('privacy.json', '{"private": true}', 'it lacks epsilon'),
        ('privacy.json', '{"private', 'not JSON'),
        ('evals/captions.json', 'x', 'not JSON'),
        ('metrics.jsonl', b'\xff\xfe', 'not text'),
    ],
)
def test_damage_is_refused(tmp_path, name, content, said):
  path = write_run(tmp_path, **FULL) / name
  path.unlink()
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=said) as failure:
    report.read_run(tmp_path)
  assert name in str(failure.value)


def test_no_workdir(tmp_path):
  with pytest.raises(UserError, match='no such directory'):
    report.read_run(tmp_path / 'absent')


def test_writes_and_prints(tmp_path, capsys):
  report.write_report(write_run(tmp_path, **FULL), diagnostics=False)
  printed, text = capsys.readouterr().out, (tmp_path / 'report.html').read_text()
  assert printed.splitlines()[-1] == str(tmp_path / 'report.html')
  assert '91.2%' in printed and '7.988 by PLD' in printed
  assert '1.6789' not in text and 'Loss, gradient norm and clip fraction are left out' in text


def test_program_refuses_in_one_line(tmp_path):
  workdir = tmp_path / 'absent'
  done = subprocess.run(
      [sys.executable, '-m', 'tools.report', f'--workdir={workdir}', '--nodiagnostics'],
      capture_output=True,
      text=True,
  )
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert done.stderr.startswith(f'error: {workdir}: no such directory')
