"""The classifiers: agree with slow versions, and have the properties DP-SGD needs."""

import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.errors import UserError
from dpcap.models.classifier import Classifier
from dpcap.models.convolution import Convolution
from dpcap.models.group_norm import GroupNorm
from dpcap.models.mlp import MLP
from dpcap.models.nf_resnet import BottleneckBlock, NFResNet
from dpcap.models.wide_resnet import WideBlock, WideResNet
from dpcap.privacy.clipping.tracing import trace_loss
from dpcap.privacy.clipping.uses import find_uses

CLASSES = 5


def make(model, remat=False, **keys):
  """With the defaults of its keys."""
  keys = {name: key.default for name, key in model.KEYS.items()} | keys
  return model.make(image_size=32, vocab_size=1, remat=remat, **keys)


def shapes_of(model, size):
  image = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
  label = jax.ShapeDtypeStruct((), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), image, label)


def random_like(shapes, seed=1):
  """Random everywhere: zero biases and unit scales would hide that one is missing."""
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(size=x.shape) if x.shape else rng.uniform(2, 4)
  return jax.tree.map(lambda x: np.float32(0.3 * draw(x)), shapes)


def paths(params):
  named = jax.tree_util.tree_leaves_with_path(params)
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in named]


# --- Sizes and how parameters are clipped, of the real models: nothing is compiled.


@pytest.mark.parametrize(
  'model, keys, size, count',
  [
    (WideResNet, {}, 32, 2_751_562),
    (WideResNet, dict(weight_standardization=True), 32, 2_753_818),
    # torchvision's ResNet-50 has 25,557,032: scale and bias of a batch norm become gain and bias.
    (NFResNet, dict(classes=1000), 224, 25_557_032 + 16),
    (MLP, {}, 28, (28 * 28 * 3 + 1) * 256 + 257 * 128 + 129 * 10),
  ],
)
def test_parameter_counts_and_which_fall_back_to_vmap(model, keys, size, count):
  model = make(model, **keys)
  variables = shapes_of(model, size)
  assert list(variables) == ['params']
  params = variables['params']
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

  def loss_fn(params, example):
    return model.apply({'params': params}, example['image'], example['label'])

  batch = {
    'image': jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
    'label': jax.ShapeDtypeStruct((2,), jnp.int32),
  }
  jaxpr = trace_loss(loss_fn, params, batch)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    uses = find_uses(jaxpr, params)
  names = paths(params)
  kernels = {name for name in names if name.endswith('kernel')}
  standardized = {name for name in kernels if name.replace('kernel', 'gain') in names}
  said = str(caught[0].message) if caught else ''
  assert {name for name in names if f'{name} (' in said} == standardized
  assert {names[i] for i in uses.direct} == {*names} - (kernels - standardized)


# --- Agreement with versions by XLA's convolutions and flax's norms.


def convolve(p, x, stride=1):
  kernel = p['kernel']
  if 'gain' in p:
    centred = kernel - jnp.mean(kernel, (0, 1, 2))
    fan_in = math.prod(kernel.shape[:3])
    kernel = p['gain'] * centred / jnp.sqrt(jnp.maximum(jnp.var(kernel, (0, 1, 2)) * fan_in, 1e-4))
  y = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return y + p['bias']


def normalize(p, x, groups):
  norm = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False)
  return norm.apply({'params': p}, x)


def direct_wide(params, x, groups):
  p = params['encoder']
  x = convolve(p['stem'], x)
  for i in range(len(p) - 2):
    b = p[f'block_{i}']
    stride = 2 if i and 'shortcut' in b else 1
    shortcut = x
    if 'shortcut' in b:
      shortcut = normalize(b['shortcut_norm'], jax.nn.relu(x), groups)
      shortcut = convolve(b['shortcut'], shortcut, stride)
    x = convolve(b['first'], normalize(b['first_norm'], jax.nn.relu(x), groups), stride)
    x = convolve(b['second'], normalize(b['second_norm'], jax.nn.relu(x), groups))
    x += shortcut
  x = jnp.mean(normalize(p['norm'], jax.nn.relu(x), groups), (1, 2))
  return x @ params['head']['kernel'] + params['head']['bias']


def direct_nf(params, x, betas, strides):
  p = params['encoder']
  relu = lambda x: 1.7139588594436646 * jax.nn.relu(x)
  x = convolve(p['stem'], x, 2)
  x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')
  for i, (beta, stride) in enumerate(zip(betas, strides)):
    b = p[f'block_{i}']
    y = relu(x) * beta
    shortcut = convolve(b['shortcut'], y, stride) if 'shortcut' in b else x
    y = convolve(b['second'], relu(convolve(b['first'], y)), stride)
    x = shortcut + 0.2 * b['skip_gain'] * convolve(b['third'], relu(y))
  x = jnp.mean(relu(x), (1, 2))
  return x @ params['head']['kernel'] + params['head']['bias']


def direct_mlp(params, x):
  x = x.reshape(len(x), -1)
  for i in range(2):
    layer = params['encoder'][f'layer_{i}']
    x = jnp.tanh(x @ layer['kernel'] + layer['bias'])
  return x @ params['head']['kernel'] + params['head']['bias']


SMALL = {
  'wide_resnet': (
    make(WideResNet, classes=CLASSES, depth=16, width=1, groups=4, weight_standardization=True),
    lambda params, x: direct_wide(params, x, 4),
  ),
  'nf_resnet': (
    make(NFResNet, classes=CLASSES, depths=(2, 2), width=4),
    lambda params, x: direct_nf(params, x, [1, 1.04**-0.5, 1.08**-0.5, 1.04**-0.5], [1, 1, 2, 1]),
  ),
  'mlp': (make(MLP, classes=CLASSES, widths=(9, 7)), direct_mlp),
}


@pytest.mark.parametrize('name', SMALL)
def test_agrees_with_a_direct_version_and_examples_do_not_mix(name):
  model, direct = SMALL[name]
  size = 13  # odd: borders on both sides
  params = random_like(shapes_of(model, size)['params'])
  rng = np.random.default_rng(2)
  images = rng.normal(size=(3, size, size, 3)).astype(np.float32)
  labels = np.array([4, 0, 2])
  run = jax.jit(
    lambda images, labels: (
      model.apply({'params': params}, images, method='logits'),
      model.apply({'params': params}, images, method='features', layers='pooled'),
      model.apply({'params': params}, images, labels),
    )
  )
  # With two leading axes, of which the second has one entry.
  logits, features, losses = (np.asarray(y)[:, 0] for y in run(images[:, None], labels[:, None]))
  np.testing.assert_allclose(logits, jax.jit(direct)(params, images), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    losses, -jax.nn.log_softmax(logits)[np.arange(3), labels], rtol=1e-5, atol=1e-5
  )
  head = params['head']
  np.testing.assert_allclose(features @ head['kernel'] + head['bias'], logits, rtol=1e-4, atol=1e-4)
  assert features.dtype == losses.dtype == np.float32
  broken = images.copy()
  broken[1] = np.nan
  after, _, losses = map(np.asarray, run(broken[:, None], np.array([4, 0, CLASSES])[:, None]))
  assert np.all(np.isnan(after[1])) and np.isnan(losses[:, 0]).tolist() == [False, True, True]
  np.testing.assert_array_equal(after[[0, 2], 0], logits[[0, 2]])


def test_a_leading_axis_changes_nothing_for_one_example():
  """As training calls it: without leading axes, where every axis is the example's."""
  model, _ = SMALL['mlp']
  params = random_like(shapes_of(model, 4)['params'])
  image = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
  run = jax.jit(lambda image, label: model.apply({'params': params}, image, label))
  one = run(image, np.int32(1))
  assert one.shape == ()
  np.testing.assert_allclose(one, run(image[None], np.array([1]))[0], rtol=1e-6)


def test_bfloat16_keeps_parameters_loss_and_features_float32():
  for model, keys in (
    (WideResNet, dict(depth=10, width=1, weight_standardization=True)),
    (NFResNet, dict(depths=(1,), width=4)),
    (MLP, dict(widths=(8,))),
  ):
    model = make(model, dtype='bfloat16', **keys)
    variables = shapes_of(model, 8)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    image, label = jnp.zeros((8, 8, 3)), jnp.zeros((), int)
    for method, arguments in (('__call__', (image, label)), ('features', (image,))):
      out = jax.eval_shape(
        lambda v, m=model, a=arguments, f=method: m.apply(v, *a, method=f), variables
      )
      assert out.dtype == np.float32


def test_an_untrained_nf_resnet_keeps_the_variance_and_skips_its_blocks():
  x = np.random.default_rng(1).normal(size=(16, 16, 32)).astype(np.float32)
  start = lambda module: jax.jit(lambda x: module.init_with_output(jax.random.key(0), x)[0])(x)
  inside = start(Convolution(64, 3, standardized=True))[1:-1, 1:-1]
  assert np.var(inside) == pytest.approx(1, rel=0.1)
  np.testing.assert_array_equal(start(BottleneckBlock(8, 1, False, 1.0, jnp.float32)), x)


# --- Clipping.


def pooled(block):
  return nn.Sequential([block, lambda x: jnp.mean(x, (-3, -2))])


CLIPPED = {
  'wide': pooled(WideBlock(4, 2, True, 2, False, jnp.float32)),
  'bottleneck': pooled(BottleneckBlock(2, 2, True, 0.9, jnp.float32)),
}


@pytest.mark.parametrize('name', CLIPPED)
def test_every_strategy_clips_a_block_as_vmap_does(name):
  model = Classifier(CLIPPED[name], 3)
  rng = np.random.default_rng(0)
  batch = {
    # Two views each.
    'image': rng.normal(size=(3, 2, 5, 6, 4)).astype(np.float32),
    'label': rng.integers(3, size=(3, 2)),
  }
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch['image'][0], batch['label'][0])
  params = random_like(shapes['params'])

  def loss_fn(params, example):
    return jnp.mean(model.apply({'params': params}, example['image'], example['label']))

  def clipped(strategy):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', privacy.ClippingFallbackWarning)
      run = lambda params, batch: privacy.clipped_sum(
        loss_fn, params, batch, clip_norm=0.3, strategy=strategy
      )
      return jax.jit(run)(params, batch)

  expected = clipped('vmap')
  assert np.all(expected.norms > 0.3), 'all are clipped'
  assert all(np.any(leaf) for leaf in jax.tree.leaves(expected.sum)), 'all parameters matter'
  for strategy in ('bookkeeping', 'ghost'):
    actual = clipped(strategy)
    np.testing.assert_allclose(actual.norms, expected.norms, rtol=1e-4)
    for a, e in zip(jax.tree.leaves(actual.sum), jax.tree.leaves(expected.sum), strict=True):
      np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)


# --- Parts and errors.


@pytest.mark.parametrize('size, stride', [(1, 2), (2, 1), (3, 2), (7, 2)])
def test_convolution_agrees_with_xla(size, stride):
  conv = Convolution(3, size, stride)
  x = np.random.default_rng(0).normal(size=(2, 3, 7, 6, 2)).astype(np.float32)
  params = random_like(jax.eval_shape(conv.init, jax.random.key(0), x)['params'])
  y = jax.jit(conv.apply)({'params': params}, x)
  expected = convolve(params, x.reshape(6, 7, 6, 2), stride)
  expected = expected.reshape(2, 3, *expected.shape[1:])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_group_norm_keeps_its_accuracy_where_the_mean_is_large():
  x = np.random.default_rng(0).normal(size=(4, 5, 6)) + 1000.0
  norm = GroupNorm(3, jnp.float32)
  params = {'scale': np.ones(6, np.float32), 'bias': np.zeros(6, np.float32)}
  groups = x.reshape(20, 3, 2)
  expected = (groups - groups.mean((0, 2), keepdims=True)) / groups.std((0, 2), keepdims=True)
  y = norm.apply({'params': params}, x.astype(np.float32))
  np.testing.assert_allclose(y, expected.reshape(x.shape), atol=2e-3)


@pytest.mark.parametrize('model', [WideResNet, NFResNet, MLP])
def test_make_refuses(model):
  with pytest.raises(UserError, match='remat=True'):
    make(model, remat=True)
  with pytest.raises(UserError, match="dtype='float16' is unknown"):
    make(model, dtype='float16')


@pytest.mark.parametrize(
  'model, key, wrong, right',
  [
    (WideResNet, 'depth', (4, 12, 17), (10, 28)),
    (WideResNet, 'groups', (0, 3, 32), (1, 16)),
    (WideResNet, 'width', (0,), (1,)),
    (NFResNet, 'depths', ((), (3, 0), (1.5,)), ((3, 4, 23, 3),)),
    (MLP, 'widths', ((), (0,)), ((8,),)),
    (MLP, 'classes', (0,), (2,)),
  ],
)
def test_keys_say_what_is_allowed(model, key, wrong, right):
  holds, _ = model.KEYS[key].check
  assert all(map(holds, right)) and not any(map(holds, wrong))
  assert model.KEYS[key].default is not None and holds(model.KEYS[key].default)


def test_an_mlp_names_an_unknown_activation():
  with pytest.raises(UserError, match="activation='gelu' is unknown; choose one of relu, tanh"):
    make(MLP, activation='gelu')
