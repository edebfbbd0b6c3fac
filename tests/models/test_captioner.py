"""The captioner: agrees with a slow float64 version, and has the properties DP-SGD needs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.models import SIZES, Captioner, make_model
from dpcap.models.positions import image_positions, text_positions
from dpcap.models.vit import grid_means
from tests.models.slow import (
  slow_attention,
  slow_blocks,
  slow_dense,
  slow_image_position,
  slow_mlp,
  slow_norm,
  slow_sincos,
)

SHAPE = dict(
  vocab_size=23,
  patch_size=4,
  width=16,
  depth=2,
  heads=4,
  decoder_width=12,
  decoder_depth=2,
  decoder_heads=3,
)
MODEL = Captioner(**SHAPE)
TOKENS = np.array(
  [
    [1, 5, 6, 7, 2, 0, 0],
    [1, 9, 22, 4, 5, 8, 2],
    [1, 2, 0, 0, 0, 0, 0],
  ]
)


@pytest.fixture(scope='module')
def images():
  """(3, 8, 12, 3): not square, so that rows and columns cannot be confused."""
  return np.random.default_rng(0).normal(size=(3, 8, 12, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def variables(images):
  """Random everywhere: zero biases and unit scales would hide that one is missing."""
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), images[0], TOKENS[0])
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes)


apply = jax.jit(MODEL.apply, static_argnames='method')


@jax.jit
def loss_and_grads(variables, image, tokens):
  """The loss of one example and its gradients by parameters and pixels."""
  loss_fn = lambda params, image: MODEL.apply({**variables, 'params': params}, image, tokens)
  return jax.value_and_grad(loss_fn, argnums=(0, 1))(variables['params'], image)


@functools.partial(jax.jit, static_argnums=0)
def run_all(model, variables, image, tokens):
  """Encoder output, memory, features, logits and loss, in one compilation."""
  memory = model.apply(variables, image, method='memory')
  return (
    model.apply(variables, image, method='encode'),
    memory,
    tuple(model.apply(variables, image, layers=x, method='features') for x in Captioner.LAYERS),
    model.apply(variables, memory, tokens[..., :-1], method='decode'),
    model.apply(variables, image, tokens),
  )


# --- Agreement with a version written from the equations, one token and one head at a time.


def slow_encoder(image, params, frozen):
  p, f, size = params['encoder'], frozen['encoder'], SHAPE['patch_size']
  rows, columns = image.shape[0] // size, image.shape[1] // size
  kernel = p['patch_projection']['kernel'].reshape(size, size, 3, -1)
  tokens = [f['class_token']]
  for r in range(rows):
    for c in range(columns):
      patch = image[r * size : (r + 1) * size, c * size : (c + 1) * size]
      tokens.append(
        np.einsum('ijc,ijcd->d', patch, kernel)
        + p['patch_projection']['bias']
        + slow_image_position(r, c, SHAPE['width'])
      )
  return slow_blocks(np.stack(tokens) + f['type_embedding'], p, SHAPE['heads'])


def slow_memory(image, encoded, params, frozen):
  x = slow_dense(encoded, params['memory_projection'])
  columns = image.shape[1] // SHAPE['patch_size']
  for t in range(1, len(x)):
    x[t] += slow_image_position(*divmod(t - 1, columns), SHAPE['decoder_width'])
  return x + frozen['memory_type_embedding']


def slow_logits(memory, tokens, params, frozen):
  p, width, heads = params['decoder'], SHAPE['decoder_width'], SHAPE['decoder_heads']
  positions = np.array([slow_sincos(t, width) for t in range(len(tokens))])
  x = p['token_embedding']['embedding'][tokens] + positions
  x = x + frozen['decoder']['type_embedding']
  for i in range(SHAPE['decoder_depth']):
    b = p[f'block_{i}']
    qkv = np.split(slow_dense(x, b['self_qkv']), 3, axis=1)
    h = slow_dense(slow_attention(*qkv, heads, causal=True), b['self_out'])
    x = slow_norm(x + h, b['self_norm'], 1e-5)
    kv = np.split(slow_dense(memory, b['cross_kv']), 2, axis=1)
    h = slow_attention(slow_dense(x, b['cross_q']), *kv, heads, causal=False)
    x = slow_norm(x + slow_dense(h, b['cross_out']), b['cross_norm'], 1e-5)
    x = slow_norm(x + slow_mlp(x, b), b['mlp_norm'], 1e-5)
  return slow_dense(slow_norm(x, p['norm'], 1e-5), p['logits'])


def slow_loss(logits, targets):
  losses = []
  for row, target in zip(logits, targets):
    if target:
      losses.append(-math.log(math.exp(row[target]) / np.sum(np.exp(row))))
  return sum(losses) / len(losses)


def test_agrees_with_the_slow_version_in_float64(images, variables):
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    image, tokens = images[0].astype(np.float64), TOKENS[0]
    model = Captioner(**SHAPE, dtype=jnp.float64)
    encoder, memory, features, logits, loss = run_all(model, wide, image, tokens)
  assert {x.dtype for x in (loss, *features)} == {np.dtype(np.float64)}
  close = dict(rtol=1e-10, atol=1e-10)
  blocks, encoded = slow_encoder(image, **wide)
  np.testing.assert_allclose(encoder, encoded, **close)
  expected = slow_memory(image, encoded, **wide)
  np.testing.assert_allclose(memory, expected, **close)
  projected = slow_dense(encoded, wide['params']['memory_projection'])
  for found, tokens_TxD in zip(features, (expected, encoded, projected)):
    np.testing.assert_allclose(found, tokens_TxD.mean(axis=0), **close)
  of_blocks = np.concatenate([x[1:].mean(axis=0) for x in blocks])
  np.testing.assert_allclose(features[3], of_blocks, **close)
  np.testing.assert_allclose(features[4], encoded[1:].ravel(), **close)  # a field each patch
  expected = slow_logits(expected, tokens[:-1], **wide)
  np.testing.assert_allclose(logits, expected, **close)
  np.testing.assert_allclose(loss, slow_loss(expected, tokens[1:]), **close)


def test_grid_means_say_where_things_are():
  """Of 5 x 3 patches in 4 x 3 fields, by rectangles and areas; the class token takes no part."""
  tokens = np.random.default_rng(1).standard_normal((2, 1 + 15, 2))
  with jax.enable_x64(True):
    found = grid_means(tokens, (5, 3))
  patches = tokens[:, 1:].reshape(2, 5, 3, 2)
  # A field is 5/4 of a row high: its first row, and the next ones by what is left of it.
  shares = [(1, 0.25, 0, 0, 0), (0, 0.75, 0.5, 0, 0), (0, 0, 0.5, 0.75, 0), (0, 0, 0, 0.25, 1)]
  expected = np.stack([sum(w * patches[:, r] for r, w in enumerate(s)) / 1.25 for s in shares], 1)
  np.testing.assert_allclose(found, expected.reshape(2, -1), rtol=1e-12)


def test_positions_agree_with_the_slow_version():
  slow = [np.zeros(8)] + [slow_image_position(r, c, 8) for r in range(2) for c in range(5)]
  np.testing.assert_allclose(image_positions(2, 5, 8), slow, atol=1e-12)
  slow = [slow_sincos(t, 6) for t in range(40)]
  np.testing.assert_allclose(text_positions(40, 6), slow, atol=1e-12)


# --- Sizes and initial values.


@pytest.mark.parametrize(
  'size, total, trained',
  [
    ('nano', 20_906_106, 20_813_754),
    ('tiny', 59_550_138, 59_365_434),
    ('small', 115_962_618, 115_685_562),
    ('base', 190_143_546, 189_774_138),
    ('large', 407_807_802, 407_376_954),
  ],
)
def test_parameter_counts_are_the_reference_implementations(size, total, trained):
  model = make_model('captioner', size=size, image_size=224, vocab_size=30_522)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((224, 224, 3)), jnp.zeros(40, int)
  )
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(variables['params']) == trained
  # What the reference also stores: positions of both widths, and four vectors it never uses.
  positions = (197 + 40) * (model.width + model.decoder_width)
  unused = 2 * model.width + 2 * model.decoder_width - model.width
  assert trained + count(variables['frozen']) + positions + unused == total


def test_initial_values():
  size = SIZES['demo']._replace(depth=1, decoder_depth=1)
  model = Captioner(vocab_size=260, **size._asdict())
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((8, 8, 3)), jnp.zeros(2, jnp.int32))
  for path, x in jax.tree_util.tree_leaves_with_path(variables['params']):
    assert x.dtype == jnp.float32
    kind = path[-1].key
    if kind == 'kernel':
      bound = math.sqrt(6 / sum(x.shape))  # of Xavier uniform
      assert 0.98 * bound < jnp.max(jnp.abs(x)) <= bound, path
    elif kind == 'embedding':
      assert abs(jnp.std(x) - 1) < 0.05
    else:
      np.testing.assert_array_equal(x, {'bias': 0, 'scale': 1}[kind])
  frozen = jnp.concatenate(jax.tree.leaves(variables['frozen']))
  assert 0.017 < jnp.std(frozen) < 0.023


# --- What the loss may depend on.


def test_later_tokens_do_not_change_earlier_logits(images, variables):
  memory = apply(variables, images[1], method='memory')
  logits = apply(variables, memory, TOKENS[1], method='decode')
  changed = TOKENS[1].copy()
  changed[3] = 20
  changed_logits = apply(variables, memory, changed, method='decode')
  np.testing.assert_array_equal(logits[:3], changed_logits[:3])
  assert jnp.all(jnp.max(jnp.abs(logits - changed_logits)[3:], axis=-1) > 1e-4)


def test_padding_carries_no_loss(images, variables):
  short = apply(variables, images[0], TOKENS[0][:5])
  padded = apply(variables, images[0], TOKENS[0])
  np.testing.assert_allclose(short, padded, rtol=1e-6)


@pytest.mark.parametrize('tokens', [[0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1]])
def test_a_caption_without_targets_has_zero_loss_and_gradient(images, variables, tokens):
  loss, grads = loss_and_grads(variables, images[0], np.array(tokens))
  assert loss == 0
  for grad in jax.tree.leaves(grads):
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize('method', ['features', 'loss'])
def test_examples_do_not_mix(images, variables, method):
  arguments = (images, TOKENS) if method == 'loss' else (images,)
  one_by_one = [apply(variables, *example, method=method) for example in zip(*arguments)]
  # With two leading axes, of which the second has one entry.
  run = lambda *arguments: np.asarray(
    apply(variables, *(x[:, None] for x in arguments), method=method)
  )[:, 0]
  np.testing.assert_allclose(run(*arguments), one_by_one, rtol=1e-5, atol=1e-6)
  broken = images.copy()
  broken[1] = np.nan
  result = run(broken, *arguments[1:])
  assert np.all(np.isnan(result[1]))
  np.testing.assert_array_equal(result[[0, 2]], run(*arguments)[[0, 2]])


def test_every_trained_parameter_and_the_image_matter(images, variables):
  _, grads = loss_and_grads(variables, images[1], TOKENS[1])
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.max(np.abs(grad)) > 1e-5, path


def test_bfloat16_keeps_parameters_loss_and_features_float32(images, variables):
  model = Captioner(**SHAPE, dtype=jnp.bfloat16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images[0], TOKENS[0])
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
  _, memory, features, logits, loss = run_all(model, variables, images, TOKENS)
  assert memory.dtype == logits.dtype == jnp.bfloat16
  assert {x.dtype for x in (loss, *features)} == {jnp.dtype(jnp.float32)}
  np.testing.assert_allclose(loss, apply(variables, images, TOKENS), rtol=0.03)
  expected = apply(variables, images, method='features')
  np.testing.assert_allclose(features[0], expected, atol=0.05)


# --- Errors.


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(name='mea'), "model='mea' is unknown; choose one of captioner"),
    (dict(size='huge'), "size='huge' is unknown; choose one of micro, demo, demo_wide"),
    (dict(dtype='float16'), "dtype='float16' is unknown; choose one of float32, bfloat16"),
    (dict(image_size=100), 'image_size=100 must be a positive multiple of the patch size, 16'),
    (dict(patch_size=15), 'image_size=224 must be a positive multiple of the patch size, 15'),
    (dict(image_size=0), 'image_size=0'),
    (dict(patch_size=0), 'patch_size=0'),
    (dict(vocab_size=0), 'vocab_size=0'),
  ],
)
def test_make_model_refuses(change, message):
  arguments = dict(name='captioner', size='nano', image_size=224, vocab_size=99) | change
  with pytest.raises(UserError, match=message):
    make_model(arguments.pop('name'), **arguments)


def test_make_model_overrides_patch_size():
  model = make_model('captioner', size='nano', image_size=224, vocab_size=9, patch_size=14)
  assert model.patch_size == 14 and SIZES['nano'].patch_size == 16


def test_an_image_that_is_not_whole_patches_is_refused(variables):
  with pytest.raises(ValueError, match='8x10'):
    MODEL.apply(variables, jnp.zeros((8, 10, 3)), method='encode')
