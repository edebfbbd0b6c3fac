"""The masked autoencoder: agrees with a slow float64 version, and has what DP-SGD needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.models import MAE, SIZES, Captioner, unstack_blocks
from dpcap.models.mae import mask_noise
from tests.models.slow import slow_blocks, slow_dense, slow_image_position

SHAPE = dict(
  patch_size=4,
  width=16,
  depth=2,
  heads=4,
  decoder_width=12,
  decoder_depth=1,
  decoder_heads=3,
  mask_ratio=0.7,  # of 6 patches 1.8 are to be kept: 1
)
MODEL = MAE(**SHAPE)
TRAINED = MODEL.clone(train_positions=True)
KEYS = np.random.default_rng(2).integers(0, 2**32, (3, 2), dtype=np.uint32)


@pytest.fixture(name='images', scope='module')
def _images():
  """(3, 8, 12, 3): not square, so that rows and columns cannot be confused."""
  return np.random.default_rng(0).normal(size=(3, 8, 12, 3)).astype(np.float32)


@pytest.fixture(name='variables', scope='module')
def _variables(images):
  """Of the model with trained positions, random everywhere."""
  shapes = jax.eval_shape(TRAINED.init, jax.random.key(0), images[0], KEYS[0])
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes)


def without_positions(variables):
  """The variables of the model whose positions are constants."""
  parts = variables['params']
  drop = lambda part: {name: x for name, x in part.items() if name != 'positions'}
  return {'params': {name: drop(part) for name, part in parts.items()}}


def outputs(model, variables, image, noise):
  """Loss, tokens of kept patches, pixels, who is removed, every kind of features."""
  return (
    model.apply(variables, image, noise, method='loss'),
    model.apply(variables, image, noise, method='encode'),
    *model.apply(variables, image, noise, method='paint'),
    *(model.apply(variables, image, layers=name, method='features') for name in MAE.LAYERS),
  )


run = jax.jit(outputs, static_argnums=0)
loss = jax.jit(MODEL.apply)


# --- Agreement with a version written from the papers, one patch and one token at a time.


def slow_patches(image):
  size = SHAPE['patch_size']
  rows, columns = image.shape[0] // size, image.shape[1] // size
  return [
    image[r * size : (r + 1) * size, c * size : (c + 1) * size].ravel()
    for r in range(rows)
    for c in range(columns)
  ]


def slow_encoder(image, p, positions, kept):
  tokens = [p['class_token'] + positions[0]]
  for patch in (slow_patches(image)[i] for i in kept):
    tokens.append(slow_dense(patch, p['patch_projection']))
  tokens[1:] = [x + positions[1 + i] for x, i in zip(tokens[1:], kept)]
  return slow_blocks(np.stack(tokens), p, SHAPE['heads'])


def slow_outputs(image, noise, params, positions):
  patches = slow_patches(image)
  by_noise = sorted(range(len(patches)), key=lambda i: noise[i])
  kept = by_noise[: int((1 - SHAPE['mask_ratio']) * len(patches))]
  encoder, decoder = params['encoder'], params['decoder']
  tokens = slow_encoder(image, encoder, positions[0], kept)[1]
  embedded = slow_dense(tokens, decoder['embedding'])
  canvas = [embedded[0]] + [decoder['mask_token']] * len(patches)
  for token, i in zip(embedded[1:], kept):
    canvas[1 + i] = token
  painted = slow_blocks(np.stack(canvas) + positions[1], decoder, SHAPE['decoder_heads'])[1]
  pixels = slow_dense(painted, decoder['pixels'])[1:]
  removed = [i not in kept for i in range(len(patches))]
  errors = [np.mean((pixels[i] - patches[i]) ** 2) for i in np.flatnonzero(removed)]
  blocks, whole = slow_encoder(image, encoder, positions[0], range(len(patches)))
  all_blocks = np.concatenate([x[1:].mean(0) for x in blocks])
  features = whole[1:].mean(0), all_blocks, whole[1:].ravel()  # the last: a field each patch
  return np.mean(errors), tokens, pixels, removed, *features


@pytest.mark.parametrize('model', [MODEL, TRAINED], ids=['constants', 'trained'])
def test_agrees_with_the_slow_version_in_float64(images, variables, model):
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    image, noise = images[0].astype(np.float64), np.random.default_rng(3).random(6)
    given = wide if model is TRAINED else without_positions(wide)
    found = run(model.clone(dtype=jnp.float64), given, image, noise)
  params = wide['params']
  if model is TRAINED:
    positions = [params[part]['positions'] for part in ('encoder', 'decoder')]
  else:
    grid = [(r, c) for r in range(2) for c in range(3)]
    positions = [
      np.array([np.zeros(width), *(slow_image_position(r, c, width) for r, c in grid)])
      for width in (SHAPE['width'], SHAPE['decoder_width'])
    ]
  expected = slow_outputs(image, noise, params, positions)
  assert np.sum(expected[3]) == 5
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


# --- The mask.


def test_the_mask_is_the_examples_own_and_follows_from_its_key():
  noise = jax.jit(mask_noise, static_argnums=1)(KEYS[:, None], 500)
  assert noise.shape == (3, 1, 500)
  for key, row in zip(KEYS, noise[:, 0]):
    np.testing.assert_array_equal(row, jax.random.uniform(jax.random.wrap_key_data(key), (500,)))
  assert abs(np.corrcoef(noise[:, 0])[np.triu_indices(3, 1)]).max() < 0.2


def test_what_is_removed_is_not_seen_and_what_is_kept_is_not_judged(images, variables):
  variables, noise = without_positions(variables), np.arange(6)[::-1] / 6.0  # patch 5 is kept
  value, tokens, pixels, removed, *_ = run(MODEL, variables, images[0], noise)
  np.testing.assert_array_equal(removed, np.arange(6) < 5)
  changed = images[0].copy()
  changed[:4] += 1  # the patches 0 to 2
  other, *seen = run(MODEL, variables, changed, noise)
  np.testing.assert_array_equal(seen[0], tokens)
  np.testing.assert_array_equal(seen[1], pixels)
  assert other != value
  target = np.stack(slow_patches(images[0]))
  np.testing.assert_allclose(value, np.mean((pixels - target)[:5] ** 2), rtol=1e-5)


# --- What DP-SGD needs.


def test_examples_do_not_mix(images, variables):
  variables = without_positions(variables)
  one_by_one = [loss(variables, image, key) for image, key in zip(images, KEYS)]
  # With two leading axes, of which the second has one entry.
  together = lambda images: np.asarray(loss(variables, images[:, None], KEYS[:, None]))[:, 0]
  np.testing.assert_allclose(together(images), one_by_one, rtol=1e-5)
  broken = images.copy()
  broken[1] = np.nan
  result = together(broken)
  assert np.isnan(result[1])
  np.testing.assert_array_equal(result[[0, 2]], together(images)[[0, 2]])


def test_every_parameter_matters(images, variables):
  loss_fn = lambda variables: TRAINED.apply(variables, images[0], KEYS[0])
  grads = jax.jit(jax.grad(loss_fn))(variables)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.max(np.abs(grad)) > 1e-6, path


def test_scan_remat_and_bfloat16_compute_the_same(images, variables):
  variables, noise = without_positions(variables), np.random.default_rng(3).random(6)
  expected = run(MODEL, variables, images[0], noise)
  stack = lambda part: {
    **{name: x for name, x in part.items() if not name.startswith('block_')},
    'blocks': jax.tree.map(
      lambda *xs: np.stack(xs), *(part[k] for k in sorted(part) if k.startswith('block_'))
    ),
  }
  stacked = {'params': {name: stack(part) for name, part in variables['params'].items()}}
  jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), variables)
  found = run(MODEL.clone(scan_blocks=True, remat=True), stacked, images[0], noise)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  found = run(MODEL.clone(dtype=jnp.bfloat16), variables, images[0], noise)
  assert found[2].dtype == jnp.bfloat16
  assert found[0].dtype == found[4].dtype == found[5].dtype == jnp.float32
  for i in (0, 4, 5):
    np.testing.assert_allclose(found[i], expected[i], rtol=0.05, atol=0.1)


# --- Making it.


def make(**changes):
  keys = {name: key.default for name, key in MAE.KEYS.items()} | {'size': 'nano'}
  return MAE.make(**(dict(image_size=224, vocab_size=1, remat=False) | keys | changes))


def test_the_sizes_are_vips():
  """Encoders of 12 blocks and 12 heads, but for large; decoder of 4 x 512 with 16 heads."""
  for size in ('nano', 'tiny', 'small', 'base', 'large'):
    model = make(size=size, remat=True, scan_blocks=True, dtype='bfloat16')
    assert model.width == SIZES[size].width
    assert (model.depth, model.heads) == ((24, 16) if size == 'large' else (12, 12))
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads) == (512, 4, 16)
    assert (model.mask_ratio, model.train_positions, model.remat) == (0.75, False, True)
    assert model.scan_blocks and model.dtype == jnp.bfloat16
  image, key = jnp.zeros((224, 224, 3)), jnp.zeros(2, jnp.uint32)
  count = lambda model: sum(
    x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), image, key))
  )
  # MAE's own ViT-Base, whose decoder is of 8 blocks, has 111,907,840 parameters with its positions.
  assert count(make(size='base', decoder_depth=8, train_positions=True)) == 111_907_840
  assert count(make(size='base', decoder_depth=8)) == 111_907_840 - 197 * (768 + 512)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(decoder_width=20), 'decoder_width=20 must be a multiple of 4 and of decoder_heads=16'),
    (dict(decoder_width=18, decoder_heads=2), 'decoder_width=18'),
    (dict(mask_ratio=0.999), 'mask_ratio=0.999 keeps 0 of 196 patches'),
    (dict(image_size=16), 'mask_ratio=0.75 keeps 0 of 1 patches'),
    (dict(dtype='float16'), "dtype='float16' is unknown"),
    (dict(patch_size=15), 'image_size=224'),
  ],
)
def test_make_refuses(change, message):
  with pytest.raises(UserError, match=message):
    make(**change)


def test_initial_values(images):
  init = jax.jit(TRAINED.clone(width=64, decoder_width=48).init)
  params = init(jax.random.key(0), images[0], KEYS[0])['params']
  for part in ('encoder', 'decoder'):
    kernel = params[part]['block_0']['attention_qkv']['kernel']
    bound = np.sqrt(6 / sum(kernel.shape))  # of Xavier uniform on the fused matrix
    assert 0.95 * bound < np.max(np.abs(kernel)) <= bound
    expected = [slow_image_position(r, c, kernel.shape[0]) for r in range(2) for c in range(3)]
    np.testing.assert_allclose(params[part]['positions'][1:], expected, atol=1e-6)
    assert not np.any(params[part]['positions'][0])
  tokens = np.concatenate([params['encoder']['class_token'], params['decoder']['mask_token']])
  assert 0.015 < np.std(tokens) < 0.025


def test_the_captioners_encoder_is_the_same_to_the_last_number(images):
  """Trained as an autoencoder, it is what a captioner can start from."""
  shape = {name: x for name, x in SHAPE.items() if name != 'mask_ratio'}
  captioner = Captioner(vocab_size=7, **shape)
  mae = MAE(**SHAPE, encoder_of='captioner')
  tokens = np.ones((3, 4), np.int32)
  theirs = jax.jit(captioner.init)(jax.random.key(0), images, tokens)
  ours = jax.jit(mae.init)(jax.random.key(1), images, KEYS)
  for collection in ('params', 'frozen'):
    encoders = [variables[collection]['encoder'] for variables in (ours, theirs)]
    assert jax.tree.map(jnp.shape, encoders[0]) == jax.tree.map(jnp.shape, encoders[1])
    ours[collection] |= {'encoder': encoders[1]}
  tokens = [
    jax.jit(model.apply, static_argnames='method')(variables, images, method='encode')
    for model, variables in ((mae, ours), (captioner, theirs))
  ]
  np.testing.assert_allclose(*tokens, rtol=0, atol=1e-6)
  assert np.isfinite(jax.jit(mae.apply)(ours, images, KEYS)).all()
