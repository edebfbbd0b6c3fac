"""Plans of what is learnt: the law, what it recommends, and the command around it, runs stubbed."""

import dataclasses
import itertools
import json
import math
import pathlib
import types

import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.training import build
from tools import runs, search
from tools.search_parts import law, measuring, planner, readings, simulation

_TRUTH = law.Law(
  floor={'micro': 0.5, 'demo': 0.2},
  scale={'micro': 12.0, 'demo': 8.0},
  decay={'micro': 0.7, 'demo': 0.5},
  noise={'micro': 0.1, 'demo': 0.2},
  noise_power=0.6,
  steps=(20.0, 400.0),
  ratios=(1e-4, 1e-2),
)
_SMOKE = 'configs/scenes.py:smoke,dpcap'


def _readings(truth=_TRUTH, spread=0.0, ratios=(1e-4, 5e-4, 2e-3, 1e-2)):
  rng = np.random.default_rng(0)
  return [
    law.Reading(size, ratio, step, truth.loss(size, step, ratio) * math.exp(rng.normal(0, spread)))
    for size in truth.scale
    for ratio in ratios
    for step in np.geomspace(20, 400, 9)
  ]


def test_a_known_law_is_found_in_noisy_losses():
  fitted, errors = law.fit(_readings(spread=0.01))
  assert errors.fit == pytest.approx(0.01, rel=0.4)
  assert errors.fit <= errors.left_out < 0.05
  assert errors.fit <= errors.fit_largest and errors.left_out <= errors.left_out_largest
  assert (fitted.steps, fitted.ratios) == ((20, pytest.approx(400)), (1e-4, 1e-2))
  # Between what was measured, and twice outside.
  for size, step, ratio in itertools.product(_TRUTH.scale, (30, 250, 800), (3e-4, 5e-3)):
    expected = _TRUTH.loss(size, step, ratio)
    assert fitted.loss(size, step, ratio) == pytest.approx(expected, rel=0.04)


def test_a_law_falls_with_steps_and_grows_with_noise():
  wild = [
    dataclasses.replace(reading, loss=loss)
    for reading, loss in zip(_readings(), itertools.cycle([0.7, 2.0, 1.1, 0.5]))
  ]
  fitted, errors = law.fit(wild)
  assert errors.fit > 0.3
  losses = [[fitted.loss('demo', t, r) for t in (10, 100, 1000)] for r in (1e-5, 1e-3, 1e-1)]
  assert (np.diff(losses, axis=1) < 0).all() and (np.diff(losses, axis=0) >= 0).all()


def test_what_the_parameters_mean():
  # At the middle of the ratios noise costs C, and more by their power.
  assert _TRUTH.loss('demo', 100, 1e-3) == pytest.approx(0.2 + 8 * 100**-0.5 + 0.2)
  assert _TRUTH.loss('demo', 100, 4e-3) == pytest.approx(0.2 + 8 * 100**-0.5 + 0.2 * 4**0.6)
  assert _TRUTH.loss('micro', 10**9, 0.0) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
  'kept, message',
  [
    (lambda r: r.ratio < 2e-3, 'size micro has runs at 2 noise-to-batch ratios; a law takes 3'),
    (lambda r: r.step == 20, '6 readings do not determine the 9 parameters'),
  ],
)
def test_too_few_readings_are_refused(kept, message):
  some = _readings(ratios=(1e-4, 5e-4, 2e-3))
  with pytest.raises(UserError, match=message):
    law.fit([reading for reading in some if kept(reading)])


def test_how_far_outside_of_what_was_measured():
  assert _TRUTH.outside(100, 1e-3) == _TRUTH.outside(400, 1e-4) == 1
  assert _TRUTH.outside(1000, 1e-3) == pytest.approx(2.5)
  assert _TRUTH.outside(800, 5e-5) == _TRUTH.outside(10, 2e-2) == 2


def _noise(batch, steps, accountant):
  """As of a real budget: a floor, and growth with the square root of what is drawn."""
  sigma = math.hypot(0.3, 2e-5 * batch * math.sqrt(steps))
  return sigma if accountant == 'rdp' else 0.95 * sigma


_COSTS = {'micro': 1e6, 'demo': 1.5e7}


@pytest.mark.parametrize('compute, dataset_size', [(1e10, 10**6), (1e12, 10**6), (1e14, 1000)])
def test_the_best_plan_is_that_of_a_search_through_all(compute, dataset_size):
  budget = planner.Budget(dataset_size, 8.0, 1e-6, compute)
  plans = planner.best(_TRUTH, _COSTS, budget, _noise)
  everything = []
  for size, power, k in itertools.product(_COSTS, range(4, 21), range(13)):
    batch, steps = 2**power, round(20 * 2 ** (k / 2))
    ratio = _noise(batch, steps, 'pld') / batch
    fits = batch <= dataset_size and batch * steps * _COSTS[size] <= compute
    if fits and steps <= 1600 and _TRUTH.outside(steps, ratio / 0.95) <= planner.FURTHEST:
      everything.append((_TRUTH.loss(size, steps, ratio), size, batch, steps))
  found = [(plan.loss, plan.size, plan.batch, plan.steps) for plan in plans]
  # Batches of equal use are left out: what is compared is what they are worth.
  expected = [entry[0] for entry in sorted(everything)[:10]]
  assert [entry[0] for entry in found] == pytest.approx(expected, rel=1e-6)
  assert set(found) <= set(everything)
  for plan in plans:
    assert plan.compute == plan.batch * plan.steps * _COSTS[plan.size] <= compute
    assert plan.noise_multiplier == _noise(plan.batch, plan.steps, 'pld')


def test_nothing_is_planned_far_from_what_was_measured():
  budget = planner.Budget(10**6, 8.0, 1e-6, 1e14)
  plans = planner.best(_TRUTH, _COSTS, budget, _noise)
  assert max(plan.outside for plan in plans) <= planner.FURTHEST
  near = dataclasses.replace(_TRUTH, ratios=(1.0, 2.0))
  with pytest.raises(UserError, match='a noise-to-batch ratio from 0.25 to 8 and 20 to 1600 steps'):
    planner.best(near, _COSTS, budget, _noise)
  with pytest.raises(UserError, match='--compute=1000 '):
    planner.best(_TRUTH, _COSTS, dataclasses.replace(budget, compute=1000.0), _noise)
  with pytest.raises(UserError, match='epsilon 8'):
    planner.best(_TRUTH, _COSTS, budget, lambda *_: None)


def test_plans_that_are_as_good_start_with_the_cheapest():
  plan = planner.Plan('demo', 64, 100, 1.0, 1e-3, 1.0, 8.0, 1.0)
  make = lambda loss, compute: dataclasses.replace(plan, loss=loss, compute=compute)
  plans = [make(1.0, 8.0), make(1.01, 2.0), make(1.02, 4.0), make(1.2, 1.0)]
  assert planner.as_good(plans, 0.05) == [plans[1], plans[2], plans[0]]
  assert planner.as_good(plans, 0.001) == plans[:1]


def test_a_flat_optimum_is_said_and_so_is_a_far_one(tmp_path, started, capsys):
  # Noise that leaves the ratio as it is whatever the batch: a smaller one is as good.
  flat = lambda batch, steps, accountant: 1e-3 * batch
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(planner, 'calibrated', lambda budget: flat)
    _, found = _search(capsys, tmp_path, *_BUDGET, '--ratios=5e-4,1e-3,2e-3')
  best, cheapest = found['plans'][0], found['cheapest']
  assert best['outside'] > 3 and f'{best["outside"]:.2g} times outside' in found['said']
  assert found['as_good'] > 1 and f'flat: {found["as_good"]} of these' in found['said']
  assert cheapest['compute'] == min(
    plan['compute'] for plan in found['plans'][: found['as_good']]
  )
  share = f'takes {cheapest["compute"] / best["compute"]:.0%} of the operations'
  assert (share in found['said']) == (cheapest != best)


def test_the_noise_of_a_budget_is_calibrated(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  noise = planner.calibrated(planner.Budget(10_000, 2.0, 1e-4, 1.0))
  assert noise(200, 50, 'rdp') > noise(100, 50, 'rdp') > 0.3
  assert noise(100_000, 50, 'rdp') is None


@pytest.mark.parametrize('ratio', [1e-6, 7e-4, 0.03, 2.0])
def test_a_simulation_has_the_ratio_and_the_batch_that_are_asked_for(ratio):
  keys = {**simulation.simulated(ratio, 8, 20), 'data.source.size': 10**7}
  config = simulation.make_config(_SMOKE, keys)
  plan = build.make_plan(config, 10**7)
  assert plan.noise_multiplier / plan.expected_batch_size == pytest.approx(ratio)
  assert (plan.expected_batch_size, plan.steps, plan.private) == (8, 20, False)
  assert plan.simulated.noise_multiplier >= 0.9
  assert config.optimizer.schedule == 'constant'


def test_a_changed_key_reaches_the_program_as_it_is_here():
  keys = simulation.simulated(0.0123456789, 8, 20)
  told = dict(a.removeprefix('--config.').split('=') for a in simulation.arguments('x', keys)[1:])
  assert {key: simulation.read_value(value) for key, value in told.items()} == keys


@pytest.mark.parametrize(
  'config, keys, message',
  [
    ('configs/nothing.py', {}, "--config is 'configs/nothing.py'; it must be configs/FILE.py"),
    (_SMOKE, {'model.width': 3}, 'config.model.width is no key of'),
    (_SMOKE, {'modle.size': 3}, 'config.modle.size is no key of'),
    (_SMOKE, {'privacy.clip_norm': 'x'}, "config.privacy.clip_norm is 'x'; it is of another type"),
    (_SMOKE, {'model.size': 'huge'}, "model.size is 'huge'; allowed: "),
  ],
)
def test_what_is_no_config_is_refused(config, keys, message):
  with pytest.raises(UserError, match=message):
    simulation.make_config(config, keys)


def _write_losses(folder, losses, examples=lambda step: 64):
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    {'step': step, 'loss': loss, 'examples': examples(step)}
    for step, loss in enumerate(losses, 1)
  ]
  (folder / 'diagnostics.private.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')


def test_losses_are_means_over_stretches_of_images(tmp_path):
  _write_losses(tmp_path, [5 / math.sqrt(step) for step in range(1, 401)])
  found = readings.read(tmp_path, 'demo', 1e-3, warmup=40)
  assert 40 < found[0].step < 55 and 320 < found[-1].step < 400
  for reading in found:
    assert (reading.size, reading.ratio) == ('demo', 1e-3)
    assert reading.loss == pytest.approx(5 / math.sqrt(reading.step), rel=2e-3)
  # Steps count by what they drew; those without a loss, not at all.
  alternating = [1.0, 3.0] * 199 + [None, None]
  _write_losses(tmp_path, alternating, examples=lambda step: 30 if step % 2 else 10)
  assert readings.read(tmp_path, 'demo', 1e-3, 0)[-1].loss == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
  'losses, message',
  [([None] * 100, 'holds no losses'), ([1.0] * 49, 'takes more than 50 steps')],
)
def test_a_run_without_losses_to_read_is_refused(tmp_path, losses, message):
  _write_losses(tmp_path, losses)
  with pytest.raises(UserError, match=message):
    readings.read(tmp_path, 'demo', 1e-3, warmup=40)


def test_how_much_of_the_variance_a_small_batch_has():
  # 1 / 64 of sampling, 1e-6 x 10,000 of noise.
  assert measuring.sampling_share(1e-3, 64, 10_000) == pytest.approx(0.015625 / 0.025625)


class Started:
  """Stands for `subprocess.Popen`: a run whose losses are those of _TRUTH.

  Attributes:
    commands: of all that were started.
    failing: those that hold this argument end with status 1.
  """

  def __init__(self):
    self.commands, self.failing = [], None

  def __call__(self, command, **_):
    self.commands.append(command)
    flags = dict(a.removeprefix('--').split('=', 1) for a in command[3:])
    keys = {
      key.removeprefix('config.'): simulation.read_value(value)
      for key, value in flags.items()
      if key.startswith('config.')
    }
    self.returncode, self.stdout = 0, ['step 1/1\n']
    if self.failing in command:
      self.returncode, self.stdout = 1, ['error: the disk is full\n']
      return self
    batch, steps = keys['privacy.expected_batch_size'], keys['train.steps']
    sigma = keys['privacy.noise_multiplier'] or _noise(batch, steps, 'pld')
    # The best learning rate is 0.01.
    worse = 1 + 0.1 * abs(math.log10(keys.get('optimizer.learning_rate', 0.01) / 0.01))
    loss = lambda step: worse * _TRUTH.loss(keys['model.size'], step, sigma / batch)
    folder = pathlib.Path(flags['workdir'])
    _write_losses(folder, [loss(step) for step in range(1, steps + 1)])
    (folder / 'privacy.json').write_text(json.dumps({'steps': steps}))
    return self

  def wait(self):
    return self.returncode

  def poll(self):
    return self.returncode


@pytest.fixture(name='started')
def _started(monkeypatch):
  started = Started()
  popen = types.SimpleNamespace(**vars(runs.subprocess) | {'Popen': started})
  monkeypatch.setattr(runs, 'subprocess', popen)
  costs = lambda experiment, size: measuring.Cost(_COSTS[size], 10_000)
  monkeypatch.setattr(measuring, 'cost', costs)
  monkeypatch.setattr(planner, 'calibrated', lambda budget: _noise)
  return started


_BUDGET = ('--epsilon=8', '--dataset_size=1000000', '--compute=1e12')


def _search(capsys, tmp_path, *arguments):
  status = search.main([f'--workdir={tmp_path}', f'--config={_SMOKE}', *arguments])
  out = capsys.readouterr().out.splitlines()
  return status, json.loads(out[-1]) if out else None


def test_the_command_measures_fits_plans_and_checks(tmp_path, started, capsys):
  status, found = _search(capsys, tmp_path, *_BUDGET, '--check', '--ratios=1e-4,1e-3,1e-2')
  assert status == 0
  assert [(run['size'], run['ratio']) for run in found['runs']] == [
    (size, ratio) for size in ('micro', 'demo') for ratio in (1e-4, 1e-3, 1e-2)
  ]
  assert found['errors']['fit'] < 0.01
  assert all(run['predicted'] == pytest.approx(run['loss'], rel=0.02) for run in found['runs'])
  best, check = found['plans'][0], found['check']
  assert (check['plan'], len(found['plans'])) == (best, 10)
  assert check['measured'] == pytest.approx(check['predicted'], rel=0.02)
  assert abs(check['error']) < 0.02 and check['error_along'] < 0.02
  flags = started.commands[-1]
  assert '--config.privacy.epsilon=8.0' in flags and '--config.data.source.size=1000000' in flags
  assert '--config.privacy.delta=1e-06' in flags and f'--config.model.size={best["size"]}' in flags
  assert found['as_good'] >= 1 and f'batch {best["batch"]:,}' in found['said']

  kept = json.loads((tmp_path / 'search.json').read_text())
  assert {key: kept[key] for key in found} == found
  assert len(kept['commands']) == len(started.commands) == 7
  text = (tmp_path / 'search.md').read_text()
  assert 'A real run' in text and found['said'] in text and kept['commit'] in text
  assert (tmp_path / 'search.png').read_bytes().startswith(b'\x89PNG')

  # What is there is not trained again; a smaller real run is planned anew.
  _, again = _search(capsys, tmp_path, *_BUDGET, '--check=1e10', '--ratios=1e-4,1e-3,1e-2')
  assert len(started.commands) == 8
  assert len(json.loads((tmp_path / 'search.json').read_text())['commands']) == 7
  assert again['plans'] == found['plans'] and again['check']['plan']['compute'] <= 1e10


def test_a_run_that_fails_is_said_and_left_out(tmp_path, started, capsys):
  sigma = simulation.simulated(1e-2, 64, 400)['privacy.noise_multiplier']
  started.failing = f'--config.privacy.noise_multiplier={sigma}'
  arguments = ('--sizes=demo', '--ratios=1e-4,1e-3,3e-3,1e-2')
  status, found = _search(capsys, tmp_path, *arguments)
  assert status == 0
  assert found['runs'][-1]['why'] == 'training ended with status 1: error: the disk is full'
  assert found['law']['ratios'] == [1e-4, 3e-3] and found['plans'] is None
  assert 'the disk is full' in (tmp_path / 'search.md').read_text()


def test_a_sweep_puts_the_best_first(tmp_path, started, capsys):
  started.failing = '--config.optimizer.learning_rate=0.1'
  status, found = _search(
    capsys,
    tmp_path,
    '--sizes=demo',
    '--ratios=1e-3',
    '--steps=100',
    '--sweep=optimizer.learning_rate=1e-3,1e-2,1e-1',
    '--sweep=privacy.clip_norm=1,0.1',
  )
  assert status == 0 and len(started.commands) == 6
  rates = [row['values']['optimizer.learning_rate'] for row in found['sweep']]
  assert rates == [0.01, 0.01, 0.001, 0.001, 0.1, 0.1]
  assert found['sweep'][0]['loss'] < found['sweep'][2]['loss'] and found['sweep'][-1]['why']
  assert {row['values']['privacy.clip_norm'] for row in found['sweep'][:2]} == {1, 0.1}
  text = (tmp_path / 'sweep.md').read_text()
  assert '| optimizer.learning_rate | privacy.clip_norm | loss at the end |' in text
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')


_DATA = '--config.data.source.size=1000'


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--ratios=1e-3,x'], "--ratios holds 'x'; it must be a finite number above 0"),
    (['--ratios=1e-3,1e-3'], '--ratios names something twice'),
    (['--batch=0'], '--batch is 0'),
    (['--epsilon=8'], 'a budget is --epsilon, --dataset_size and --compute; give all three'),
    ([*_BUDGET, '--delta=1'], '--delta is 1.0; it must be below 1'),
    (['--check'], '--check goes with --epsilon'),
    (['--sweep=optimizer.learning_rate=1'], '--sweep goes with one size and one ratio'),
    (['--sweep=optimizer.learning_rate'], 'it must be KEY=VALUE,VALUE,...'),
    (['--sweep=privacy.epsilon=1,2'], '--sweep=privacy.epsilon: a search sets this key itself'),
    (['--config.train.steps=3'], '--config.train.steps: a search sets this key itself'),
    (['--sizes=huge'], "model.size is 'huge'; allowed: "),
    (['--nonsense'], "unknown argument '--nonsense'"),
    ([_DATA, '--ratios=0.1,1,10'], 'a run of 25,600 images would see the 1,000 of the source more'),
    (['--config=configs/emoji.py:/data'], '--public_data, by which you say that these are public'),
  ],
)
def test_what_is_wrong_is_refused_at_the_door(tmp_path, started, capsys, arguments, message):
  assert search.main([f'--workdir={tmp_path}', f'--config={_SMOKE}', *arguments]) == 2
  assert message in capsys.readouterr().err
  assert not started.commands and not list(tmp_path.iterdir())
