"""Tables of the study: what they ask for, how runs are shared and resumed, what is said of them."""

import json
import os
import pathlib
import signal
import subprocess
import threading
import types

import pytest

from dpcap import config as config_lib
from dpcap.errors import UserError
from tools import reproduce
from tools import runs as processes
from tools.reproduce_parts import scales, study
from tools.reproduce_parts.table import Row, Table, above, above_chance, unmeasured
from tools.tables import TABLES, privacy

_ROW = Row('DP-Cap', 'dpcap:base', 'count_linear_probe', 'count', paper=0.658, source='abstract')


class Started:
  """Stands for `subprocess.Popen`: does in no time what trainings and evaluations would do.

  Attributes:
    commands: of all processes that were started.
    failing: those whose --config holds this text end with status 1.
  """

  def __init__(self):
    self.commands, self.failing = [], None

  def __call__(self, command, **_):
    self.commands.append(command)
    flags = dict(argument.removeprefix('--').split('=', 1) for argument in command[3:])
    config, folder = processes.load(flags['config']), pathlib.Path(flags['workdir'])
    self.returncode, self.stdout = 0, ['step 1/1\n']
    if self.failing and self.failing in flags['config']:
      self.returncode, self.stdout = 1, ['...\n', 'error: the disk is full\n']
    elif command[2] == 'dpcap.train':
      folder.mkdir(parents=True)
      private = config.privacy.epsilon != float('inf')
      bounds = {'pld': 7.5 if private else None, 'rdp': 8.0 if private else None}
      statement = {'steps': config.train.steps, 'private': private, 'epsilon': bounds}
      (folder / 'privacy.json').write_text(json.dumps(statement))
    else:
      (folder / 'evals').mkdir(exist_ok=True)
      for name, entry in json.loads(config_lib.to_json(config))['evals'].items():
        figures = {'value': 0.6, 'interval95': [0.5, 0.7]}
        record = figures | {'n': 100, 'chance': 0.25, 'checkpoint': f'/x/{config.train.steps}'}
        record['uses_training_data'] = False
        record['options'] = {k: v for k, v in entry.items() if k not in ('name', 'apart')}
        record['shots'] = {str(k): figures for k in record['options'].get('shots', ())}
        (folder / 'evals' / f'{name}.json').write_text(json.dumps(record))
    return self

  def wait(self):
    return self.returncode

  def poll(self):
    return self.returncode


def _subprocess(popen):
  kept = {name: getattr(subprocess, name) for name in ('PIPE', 'STDOUT', 'run')}
  return types.SimpleNamespace(Popen=popen, **kept)


@pytest.fixture(name='started')
def _started(monkeypatch):
  started = Started()
  monkeypatch.setattr(processes, 'subprocess', _subprocess(started))
  return started


def _measured(name='a', value=0.5, low=0.4, high=0.6, **more):
  row = unmeasured(Row(name, 'dpcap'))
  return row | {'value': value, 'low': low, 'high': high} | more


@pytest.mark.parametrize('scale', scales.SCALES)
@pytest.mark.parametrize('name', TABLES)
def test_every_row_has_a_config_that_trains_and_one_that_evaluates(name, scale):
  rows = TABLES[name].rows(scale)
  assert len({(row.name, row.group) for row in rows}) == len(rows)
  for row in rows:
    # What is only accounted is so at full size.
    trained_at = scale if row.evaluation else 'paper'
    config_lib.validate(processes.load(scales.training_config(trained_at, row.run)))
    if row.evaluation:
      (config,) = scales.evaluation_configs(scale, row.run, [row.evaluation])
      config = processes.load(config)
      config_lib.validate(config)
      assert row.evaluation in config.evals
      if row.shots:
        assert row.shots in config.evals[row.evaluation].shots
    assert (row.paper is None) == (row.source is None)


@pytest.mark.parametrize('name', [name for name in TABLES if name != 'privacy'])
def test_every_table_can_be_made(name, tmp_path, started, capsys):
  assert reproduce.main([name, '--scale=smoke', f'--workdir={tmp_path}']) == 0
  made = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (made['table'], made['scale']) == (name, 'smoke')
  assert made['findings']
  for row in made['rows']:
    assert (row['value'], row['low'], row['high'], row['n']) == (0.6, 0.5, 0.7, 100), row
  for finding in made['findings']:
    assert set(finding) == {'name', 'holds', 'why'}
    assert finding['holds'] is (True if 'chance' in finding['name'] else None)
  kept = json.loads((tmp_path / f'{name}.json').read_text())
  assert {key: kept[key] for key in made} == made
  commands = {' '.join(['python', *command[1:]]) for command in started.commands}
  assert commands <= set(kept['commands'])
  assert kept['date'] and kept['commit']
  assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
  text = (tmp_path / f'{name}.md').read_text()
  assert '60.0%' in text and '50.0% to 70.0%' in text and kept['commit'] in text
  assert 'nothing is learnt' in text and '| chance |' in text and '| 25.0% |' in text


def test_runs_are_shared_and_what_is_done_is_not_done_again(tmp_path, started):
  programs = lambda: [command[2] for command in started.commands]
  reproduce.make('zero_shot', 'smoke', tmp_path)
  assert programs() == ['dpcap.train', 'dpcap.evaluate'] * 2
  reproduce.make('compositional', 'smoke', tmp_path)
  assert programs()[4:] == ['dpcap.evaluate'] * 2
  reproduce.make('zero_shot', 'smoke', tmp_path)
  assert len(started.commands) == 6
  assert len(json.loads((tmp_path / 'zero_shot.json').read_text())['commands']) == 4
  # Of an evaluation that is gone, or of another config or step, only that one.
  records = sorted(tmp_path.glob('runs/*/evals/color_zero_shot.json'))
  records[0].unlink()
  records[1].write_text(records[1].read_text().replace('"/x/4"', '"/x/2"'))
  reproduce.make('zero_shot', 'smoke', tmp_path)
  assert programs()[6:] == ['dpcap.evaluate'] * 2


def test_what_may_come_from_training_images_stays_off_the_table(tmp_path, started):
  reproduce.make('data', 'smoke', tmp_path)
  private, damaged, _ = sorted(tmp_path.glob('runs/*/evals/*.json'))
  for path, was in ((private, True), (damaged, None)):
    path.write_text(json.dumps(json.loads(path.read_text()) | {'uses_training_data': was}))
  before = len(started.commands)
  rows = reproduce.make('data', 'smoke', tmp_path)['rows']
  assert sorted(row['value'] is None for row in rows) == [False, True, True]
  assert sum('count_linear_probe.apart=True' in (row['why'] or '') for row in rows) == 2
  assert len(started.commands) == before


def test_the_same_config_by_other_words_is_the_same_run(tmp_path):
  assert scales.stage_of('paper', 'dpcap:nonprivate,synthetic') == 'textures:base,for_dpcap'
  runs = study.Study('cpu', tmp_path)
  assert runs.folder('dpcap:base') == runs.folder('dpcap:calibrated,epsilon8')
  assert runs.folder('dpcap:base') != runs.folder('dpcap:epsilon2')


def test_a_run_that_fails_loses_its_own_rows_only(tmp_path, started):
  started.failing = 'nonprivate'
  made = reproduce.make('epsilon', 'smoke', tmp_path)
  *others, lost = made['rows']
  assert all(row['value'] == 0.6 and row['why'] is None for row in others)
  assert lost['value'] is None
  assert lost['why'] == 'training ended with status 1: error: the disk is full'
  assert made['findings'][0]['holds'] is None
  assert sum('evaluate' in command[2] for command in started.commands) == 3
  assert 'the disk is full' in (tmp_path / 'epsilon.md').read_text()


def test_a_run_starts_from_its_stage_which_is_trained_first(tmp_path, started):
  row = Row('x', 'dpcap:base,synthetic', 'count_linear_probe')
  runs = study.Study('smoke', tmp_path)
  runs.prepare([row])
  stage, run, evaluation = started.commands
  assert '--config=configs/scenes.py:smoke,textures,base,for_dpcap' in stage
  assert f'--config.train.init={runs.folder("textures:base,for_dpcap")}' in run
  assert runs.measure(row)['value'] == 0.6 and 'dpcap.evaluate' in evaluation


def test_without_its_stage_a_run_is_not_started(tmp_path, started):
  started.failing = 'textures'
  row = Row('x', 'vip:base,synthetic', 'count_linear_probe')
  runs = study.Study('smoke', tmp_path)
  runs.prepare([row])
  assert len(started.commands) == 1
  assert 'textures:base,for_vip, which it starts from: training ended' in runs.measure(row)['why']


def test_epsilon_is_the_tightest_of_the_statement_none_without_privacy_and_0_without_training(
  tmp_path, started
):
  rows = reproduce.make('linear_probe', 'smoke', tmp_path)['rows']
  found = {row['name']: row['epsilon'] for row in rows}
  assert found['DP-Cap'] == 7.5 and found['Cap, no privacy'] is None
  assert found['HOG'] == found['untrained encoder'] == found['pixels'] == 0


def test_at_full_scale_commands_are_printed_and_a_launcher_starts_trainings(tmp_path, capsys):
  evaluations = 'imagenet_linear_probe', 'aro_coco_order'
  rows = [Row(name, 'dpcap:large', name) for name in evaluations]
  runs = study.Study('paper', tmp_path)
  runs.prepare(rows)
  train, *evaluate = runs.commands
  folder = runs.folder('dpcap:large')
  assert train == f'python -m dpcap.train --config=configs/dpcap.py:large --workdir={folder}'
  assert [command.split()[3] for command in evaluate] == [
    '--config=configs/evaluations.py:imagenet@dpcap:large',
    '--config=configs/evaluations.py:aro@dpcap:large',
  ]
  assert train in capsys.readouterr().err
  measured = runs.measure(rows[0])
  assert measured['value'] is None and 'not run' in measured['why']
  assert measured['epsilon'] == pytest.approx(7.337, abs=1e-3)

  launched = study.Study('paper', tmp_path, 'echo launched by')
  launched.prepare(rows)
  said = capsys.readouterr().err
  assert f'launched by -- --config=configs/dpcap.py:large --workdir={folder}\n' in said
  lost = study.Study('paper', tmp_path, 'sh -c "echo 5 of 9 pairs are broken; exit 1"')
  lost.prepare(rows)
  assert lost.measure(rows[0])['why'] == 'training ended with status 1'
  assert '5 of 9 pairs' in capsys.readouterr().err


def test_sigterm_is_passed_on_and_ends_with_its_status(tmp_path, monkeypatch):
  children = []

  def sleep(command, **options):
    del command
    children.append(subprocess.Popen(['sleep', '60'], **options))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return children[-1]

  monkeypatch.setattr(processes, 'subprocess', _subprocess(sleep))
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as e:
    study.Study('smoke', tmp_path).prepare([_ROW])
  assert e.value.code == 143
  assert [child.returncode for child in children] == [-signal.SIGTERM]
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_row_is_above_another_where_the_intervals_are_apart():
  better, worse = _measured('a', 0.8, 0.75, 0.85), _measured('b', 0.6, 0.55, 0.65)
  assert above('x', better, worse).holds is True
  assert above('x', worse, better).holds is False
  overlapping = above('x', better, _measured('b', 0.72, 0.7, 0.76))
  assert overlapping.holds is None and 'overlap' in overlapping.why
  assert above('x', _measured('b', 0.72, 0.7, 0.76), better).holds is None
  lost = unmeasured(Row('c', 'dpcap')) | {'why': 'it broke'}
  assert above('x', better, lost).holds is None and 'it broke' in above('x', better, lost).why
  assert above_chance('x', better | {'chance': 0.5}).holds is True
  assert above_chance('x', better | {'chance': 0.8}).holds is None


def test_what_the_runs_guarantee_is_accounted_without_training(tmp_path, monkeypatch):
  monkeypatch.setattr(privacy, '_RUNS', (('DP-Cap', 'dpcap:epsilon2', 2.0, True),))
  made = reproduce.make('privacy', 'smoke', tmp_path)
  (row,) = made['rows']
  assert row['noise_multiplier'] == 1.18 and row['paper'] == 2.0
  assert row['epsilon_rdp'] == pytest.approx(1.993, abs=1e-3)
  assert row['value'] == row['epsilon'] == row['epsilon_pld'] == pytest.approx(1.777, abs=1e-3)
  assert row['sigma_pld'] < row['sigma_rdp'] < 1.18
  assert [finding['holds'] for finding in made['findings']] == [True, True]
  assert '| 1.777 |' in (tmp_path / 'privacy.md').read_text()
  assert not (tmp_path / 'runs').exists()


def test_a_table_from_runs_that_are_really_trained(tmp_path, monkeypatch, capsys):
  table = Table('One probe', lambda scale: [_ROW], lambda rows: [])
  monkeypatch.setitem(TABLES, 'size', table)
  assert reproduce.main(['size', '--scale=smoke', f'--workdir={tmp_path}']) == 0
  (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])['rows']
  assert row['low'] <= row['value'] <= row['high'] and row['n'] == 100, row['why']
  assert 0 < row['epsilon'] <= 8 and row['paper'] == 0.658
  text = (tmp_path / 'size.md').read_text()
  assert 'dpcap.train --config=configs/scenes.py:smoke,dpcap,base' in text


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['probes', '--scale=cpu', '--workdir=x'], "'probes'.*linear_probe"),
    (['data', '--scale=tpu', '--workdir=x'], "'tpu'.*cpu"),
    (['data', '--scale=cpu'], '--workdir'),
    (['data', '--scale=cpu', '--workdir=x', '--launch=y'], '--launch.*--scale=paper only'),
  ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
  assert reproduce.main(arguments) == 2
  with pytest.raises(UserError, match=message):
    reproduce.parse(arguments)
  assert capsys.readouterr().err.count('\n') == 1


def test_tables_name_commit_machine_and_date():
  made = processes.provenance('2026-01-02 03:04 UTC', ['python -m x'])
  assert made['date'] == '2026-01-02 03:04 UTC' and made['commands'] == ['python -m x']
  assert 'CPU cores' in made['machine'] and made['commit']
