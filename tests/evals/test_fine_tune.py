"""Fine-tuning: rates of the layers, and that it learns from images what it is asked."""

import jax
import numpy as np
import optax
import pytest

from dpcap.errors import UserError
from dpcap.evals import fine_tune


def _evaluate(subject, **changes):
  options = dict(
    train=dict(split='validation', size=64),
    test=dict(split='test', size=30),
    epochs=1,
    warmup_epochs=0,
    base_learning_rate=1e-3,
    layer_decay=0.65,
    weight_decay=0.05,
    label_smoothing=0.1,
    train_batch_size=32,
    batch_size=16,
  )
  return fine_tune.evaluate(subject, **options | changes)


def test_layers_have_their_rates():
  params = {
    'encoder': {
      'patch_projection': {'kernel': np.ones((2, 2))},
      'block_0': {'mlp': {'kernel': np.ones((2, 2))}},
      'block_1': {'mlp': {'kernel': np.ones((2, 2))}},
      'norm': {'scale': np.ones(2)},
    },
    'memory_projection': {'kernel': np.ones((2, 2)), 'bias': np.zeros(2)},
    'head': {'kernel': np.ones((2, 3)), 'bias': np.zeros(3)},
  }
  optimizer = fine_tune.make_optimizer(params, lambda step: 0.1, layer_decay=0.5, weight_decay=0.0)
  grads = jax.tree.map(np.ones_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  # Adam's first step is the rate.
  rate = lambda tree: -float(jax.tree.leaves(tree)[0].ravel()[0])
  encoder = updates['encoder']
  assert rate(updates['head']) == rate(encoder['norm']) == pytest.approx(0.1, rel=1e-5)
  assert rate(updates['memory_projection']) == pytest.approx(0.1, rel=1e-5)
  assert rate(encoder['block_1']) == pytest.approx(0.05, rel=1e-5)
  assert rate(encoder['block_0']) == pytest.approx(0.025, rel=1e-5)
  assert rate(encoder['patch_projection']) == pytest.approx(0.0125, rel=1e-5)


def test_biases_do_not_decay():
  params = {
    'encoder': {'block_0': {'mlp': {'bias': np.ones(2)}}},
    'head': {'kernel': np.ones((2, 3))},
  }
  optimizer = fine_tune.make_optimizer(params, lambda step: 0.1, layer_decay=0.5, weight_decay=0.3)
  grads = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  assert not np.any(updates['encoder']['block_0']['mlp']['bias'])
  np.testing.assert_allclose(updates['head']['kernel'], -0.03, rtol=1e-5)


def test_every_layer_of_the_encoder_learns_and_the_model_stays(subject, monkeypatch):
  """Whether a step's gradient comes at once or in parts that are added up."""
  seen = []
  apply_updates = optax.apply_updates

  def noting(params, updates):
    jax.debug.callback(lambda updates: seen.append(jax.tree.map(np.array, updates)), updates)
    return apply_updates(params, updates)

  monkeypatch.setattr(optax, 'apply_updates', noting)
  before = jax.tree.map(np.array, subject.variables)
  result = _evaluate(subject, batch_size=32)
  whole, seen = seen, []
  parts = _evaluate(subject, batch_size=8)
  assert (result.metric, result.n) == ('top1', 30) and result.details['chance'] == 1 / 8
  assert len(whole) == 2  # 64 images in steps of 32
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole[1], seen[1])
  assert parts.details['confusion'] == result.details['confusion']
  changed = {
    jax.tree_util.keystr(path): np.any(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole[1])
  }
  assert all(changed.values()), changed
  assert any('block_0' in name for name in changed) and any('patch' in name for name in changed)
  assert not any('decoder' in name for name in changed)
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, subject.variables))


def test_learns(subject):
  """The colour of the large object, on the very images: more than chance by far."""
  same = dict(split='validation', size=64)
  result = _evaluate(
    subject,
    train=same | {'label': 'color'},
    test=same,
    epochs=40,
    base_learning_rate=0.08,
    layer_decay=1.0,
    label_smoothing=0.0,
  )
  assert result.value > 0.4


def test_a_source_for_both_is_refused(subject):
  with pytest.raises(UserError, match='fine_tune: train and test are the same source'):
    _evaluate(subject, train=dict(split='test', size=30))
