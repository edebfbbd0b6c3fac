"""A convolutional stem: a token each patch, in order; what it costs to clip; what it is not for."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.models import make_model
from dpcap.models.reference_weights import to_reference
from dpcap.models.stem import ConvolutionalStem
from dpcap.privacy.clipping.tracing import trace_loss
from dpcap.privacy.clipping.uses import find_uses

_MAKE = functools.partial(make_model, 'captioner', size='micro', image_size=16, vocab_size=11)


@pytest.mark.parametrize('patch_size', [2, 8])
def test_tokens_are_of_patches_row_by_row(patch_size):
  """Kernels and norms reach beyond a patch, so that only the centre of what counts moves with it."""
  stem = ConvolutionalStem(patch_size, 16, jnp.float32)
  rng = np.random.default_rng(patch_size)
  image = rng.standard_normal((2 * patch_size, 3 * patch_size, 3)).astype(np.float32)
  variables = stem.init(jax.random.key(0), image)
  slopes = jax.jit(jax.jacrev(functools.partial(stem.apply, variables)))(image)
  assert slopes.shape == (6, 16, *image.shape)
  weights = np.square(slopes).sum((1, 4)).reshape(2, 3, *image.shape[:2])
  weights /= weights.sum((2, 3), keepdims=True)
  row = weights.sum(3) @ np.arange(image.shape[0])
  column = weights.sum(2) @ np.arange(image.shape[1])
  assert np.all(np.diff(row, axis=0) > 0) and np.all(np.diff(column, axis=1) > 0)


def test_leading_axes_do_not_mix():
  stem = ConvolutionalStem(4, 16, jnp.float32)
  images = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 3)).astype(np.float32)
  variables = stem.init(jax.random.key(1), images[0, 0])
  np.testing.assert_allclose(
    stem.apply(variables, images)[1, 2], stem.apply(variables, images[1, 2]), atol=1e-5
  )


def test_it_is_clipped_without_per_example_gradients():
  model = _MAKE(stem='convolutional')
  batch = {
    'image': jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32),
    'tokens': jax.ShapeDtypeStruct((2, 5), jnp.int32),
  }
  variables = jax.eval_shape(
    model.init, jax.random.key(0), *(jnp.zeros(x.shape[1:], x.dtype) for x in batch.values())
  )

  def loss(params, example):
    frozen = jax.tree.map(lambda x: jnp.zeros(x.shape), variables['frozen'])
    return model.apply({'params': params, 'frozen': frozen}, example['image'], example['tokens'])

  with warnings.catch_warnings():
    warnings.simplefilter('error')  # of parameters that fall back to vmap
    find_uses(trace_loss(loss, variables['params'], batch), variables['params'])


@pytest.mark.parametrize(
  'keys, message',
  [
    (dict(stem='none'), "stem='none'"),
    (dict(stem='convolutional', patch_size=1), 'patch_size=1 must be a power of 2'),
  ],
)
def test_what_does_not_fit_is_refused(keys, message):
  with pytest.raises(UserError, match=message):
    _MAKE(**keys)


def test_reference_checkpoints_have_none():
  model = _MAKE(stem='convolutional')
  with pytest.raises(UserError, match='stem'):
    to_reference({}, model)
