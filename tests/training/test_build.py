"""Configs become parts; what does not belong together is refused under its key."""

import math
import re

import jax
import numpy as np
import pytest

from configs import dpcap, mae, scenes, tan, vip
from dpcap import data, privacy
from dpcap.errors import UserError
from dpcap.training import build
from tests import tiny


@pytest.mark.parametrize(
  'words, rdp, pld',
  [
    ('', 8.05, 7.34),
    ('epsilon2', 1.99, 1.78),
    ('batch200k', 7.98, 6.85),
    ('10percent', 7.35, 6.66),
    ('1percent', 6.63, 5.96),
  ],
)
def test_the_paper_s_configs_give_its_ten_figures(words, rdp, pld):
  config = dpcap.get_config(words)
  plan = build.make_plan(config, config.data.dataset_size)
  assert round(plan.epsilon(accountant='rdp'), 2) == rdp
  assert round(plan.epsilon(accountant='pld'), 2) == pld
  assert plan.delta == 1 / config.data.dataset_size


@pytest.mark.parametrize(
  'words, epsilon',
  [
    ('calibrated', 8),
    ('epsilon2,calibrated', 2),
    ('batch200k,calibrated', 8),
    ('1percent,calibrated', 8),
    ('epsilon1', 1),
    ('batch20k', 8),
  ],
)
def test_runs_of_the_study_are_calibrated_where_asked_or_where_the_paper_has_no_noise(
  words, epsilon
):
  config = dpcap.get_config(words)
  assert (config.privacy.epsilon, config.privacy.noise_multiplier) == (epsilon, None)
  config.privacy.accountant = 'rdp'  # in less time
  plan = build.make_plan(config, config.data.dataset_size)
  assert 0.99 * epsilon < plan.epsilon() <= epsilon


@pytest.mark.parametrize(
  'config, rdp',
  [
    (vip.get_config(), 7.99),  # 7.996 for N = 233 million; this is the N of DP-Cap's subset
    (vip.get_config('script'), 6.99),
    (tan.get_config('cifar10'), 7.10),
    (tan.get_config('imagenet'), 7.98),
    (tan.get_config('imagenet,calibrated'), None),
    (mae.get_config(), math.inf),
  ],
)
def test_the_runs_that_dp_cap_is_compared_with_give_their_figures(config, rdp):
  config.privacy.accountant = 'rdp'
  epsilon = build.make_plan(config, config.data.dataset_size).epsilon()
  if rdp is None:
    assert 7.99 < epsilon <= 8
  else:
    assert round(epsilon, 2) == rdp
  build.make_model(config, vocab_size=50)


@pytest.mark.parametrize('experiment, part', [('dpcap', 'encoder'), ('vip', None)])
def test_the_stage_has_the_weights_of_whom_it_is_for(experiment, part):
  """Names and shapes, as `train.init` compares them."""
  found = []
  for words in (f'{experiment},synthetic', f'textures,for_{experiment}'):
    config = scenes.get_config(words)
    model = build.make_model(config, vocab_size=50)
    example = build.synthetic_examples(config, vocab_size=50, count=1)
    example['image'] = data.normalize(example['image'])
    inputs = [example[name] for name in model.INPUTS]
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    found.append({kind: tree[part] if part else tree for kind, tree in variables.items()})
    assert config.train.init_parts == (('all',) if not part or 'textures' in words else (part,))
  assert jax.tree.map(lambda x: x.shape, found[0]) == jax.tree.map(lambda x: x.shape, found[1])


def test_the_study_scaled_down_keeps_its_proportions():
  main, some = scenes.get_config('dpcap'), scenes.get_config('dpcap,1percent,batch328k,epsilon2')
  assert some.data.source.size == main.data.source.size // 100
  assert some.privacy.expected_batch_size == main.privacy.expected_batch_size // 400 + 1
  assert (some.privacy.epsilon, main.privacy.epsilon) == (2, 8)
  assert some.train.steps == main.train.steps // 2
  with pytest.raises(UserError, match="'epsilon3' is no word of this config"):
    scenes.get_config('dpcap,epsilon3')


def test_epsilon_is_met_from_below_and_delta_defaults_to_one_over_n():
  config = tiny.get_config()
  config.privacy.noise_multiplier, config.privacy.epsilon = None, 0.5
  plan = build.make_plan(config, 400)
  assert 0.499 < plan.epsilon() <= 0.5 and plan.delta == 1 / 400
  config.privacy.epsilon = math.inf
  assert not build.make_plan(config, 400).private


@pytest.mark.parametrize('given', ['noise_multiplier', 'epsilon'])
def test_a_simulation_divides_batch_and_noise_of_the_run_as_it_would_be(given):
  config = tiny.get_config()
  if given == 'epsilon':
    config.privacy.noise_multiplier, config.privacy.epsilon = None, 0.5
  run = build.make_plan(config, 400)
  config.privacy.simulation_divisor = 4
  plan = build.make_plan(config, 400)
  assert plan == run.simulation(4) and not plan.private
  assert plan.expected_batch_size == 5
  assert plan.noise_multiplier == run.noise_multiplier / 4
  config.privacy.noise_multiplier, config.privacy.epsilon = None, math.inf
  with pytest.raises(UserError, match="config.privacy: simulation_divisor is 4; .*'none'"):
    build.make_plan(config, 400)


@pytest.mark.parametrize(
  'key, value, said',
  [
    ('sampler', 'shuffle', 'shuffle'),
    ('simulation_divisor', 3, 'divides expected_batch_size, 20'),
    ('expected_batch_size', 401, '401'),
    ('clip_norm', math.inf, 'clip_norm is inf'),
  ],
)
def test_pairs_that_do_not_belong_together_are_refused(key, value, said):
  config = tiny.get_config()
  config.privacy[key] = value
  with pytest.raises(UserError, match=said):
    build.make_plan(config, 400)


def test_declared_and_true_size_must_agree():
  config = tiny.get_config()
  config.data.dataset_size = 400
  assert len(build.make_training_source(config)) == 400
  config.data.dataset_size = 401
  with pytest.raises(UserError, match='data.dataset_size is 401.*400 records'):
    build.make_training_source(config)


@pytest.mark.parametrize(
  'good, outcome',
  [(0, 'refused'), (1, 'warned of'), (31, 'warned of'), (32, 'taken'), (64, 'taken')],
)
def test_data_without_anything_to_learn_from_are_refused(good, outcome, monkeypatch, caplog):
  """A wrong caption_key in the json, say; what is said goes to the screen."""

  class Source(list):
    about = 'as counted'

  made = data.make_source('scenes', image_size=16, split='train', size=1)
  source = Source([{**made[0], 'caption': 'a dog' if i < good else None} for i in range(64)])
  monkeypatch.setattr(build, 'make_source', lambda *_: source)
  said = f'{good} of 64 records, spread over all 64, can be used; the others: no caption'
  said += rf' \({64 - good}\) \(as counted\)'
  if outcome == 'refused':
    with pytest.raises(UserError, match=said):
      build.make_training_source(tiny.get_config())
  else:
    assert build.make_training_source(tiny.get_config()) is source
    assert bool(re.search(said, caplog.text)) == (outcome == 'warned of')


def test_clip_functions_are_made_with_their_settings():
  config = tiny.get_config()
  assert build.make_clip_function(config) == privacy.Clip()
  config.privacy.clip_function = 'automatic'
  assert build.make_clip_function(config) == privacy.Automatic()
  config.privacy.gamma = 0.5
  assert build.make_clip_function(config) == privacy.Automatic(gamma=0.5)


def test_synthetic_examples_have_the_shapes_of_real_ones():
  config = tiny.get_config()
  examples = build.synthetic_examples(config, vocab_size=50, count=3)
  assert examples['image'].shape == (3, 16, 16, 3) and examples['image'].dtype == np.uint8
  assert examples['tokens'].shape == (3, 8) and examples['tokens'].dtype == np.int32
  assert 0 <= examples['tokens'].min() and examples['tokens'].max() < 50
  # Some padding, and targets before it.
  assert np.all(examples['tokens'][:, -1] == 0)
  assert np.all(np.any(examples['tokens'][:, 1:] > 0, axis=1))
