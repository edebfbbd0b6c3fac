"""Scanned and rematerialised blocks compute what unrolled ones do."""

import itertools

import jax
import numpy as np
import pytest

from dpcap.models import Captioner, unstack_blocks

_DEPTH = 3
_SHAPE = dict(
  vocab_size=13,
  patch_size=4,
  width=8,
  depth=_DEPTH,
  heads=2,
  decoder_width=12,
  decoder_depth=_DEPTH,
  decoder_heads=3,
)
_TOKENS = np.array([1, 5, 6, 2, 0])


@pytest.fixture(name='image', scope='module')
def _image():
  return np.random.default_rng().normal(size=(8, 8, 3)).astype(np.float32)


@pytest.fixture(name='stacked', scope='module')
def _stacked(image):
  """Initial variables of the model with scanned blocks."""
  model = Captioner(**_SHAPE, scan_blocks=True)
  return jax.jit(model.init)(jax.random.key(0), image, _TOKENS)


def _loss_and_grads(variables, image, **settings):
  model = Captioner(**_SHAPE, **settings)
  loss_fn = lambda params: model.apply({**variables, 'params': params}, image, _TOKENS)
  return jax.jit(jax.value_and_grad(loss_fn))(variables['params'])


def test_scan_and_remat_change_nothing(image, stacked):
  expected_loss, expected = _loss_and_grads(unstack_blocks(stacked), image)
  for scan, remat in itertools.product((False, True), repeat=2):
    if scan or remat:
      variables = stacked if scan else unstack_blocks(stacked)
      loss, grads = _loss_and_grads(variables, image, scan_blocks=scan, remat=remat)
      np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
      close = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6)
      jax.tree.map(close, unstack_blocks(grads) if scan else grads, expected)


def test_remat_computes_blocks_again(image, stacked):
  """So that less is kept: otherwise the option would do nothing."""

  def products(**settings):
    variables = stacked if settings.get('scan_blocks') else unstack_blocks(stacked)
    model = Captioner(**_SHAPE, **settings)
    loss_fn = lambda params: model.apply({**variables, 'params': params}, image, _TOKENS)
    text = str(jax.make_jaxpr(jax.grad(loss_fn))(variables['params']))
    return text.count('dot_general')

  assert products(remat=True) > products()
  assert products(scan_blocks=True, remat=True) > products(scan_blocks=True)
  # One block is compiled instead of _DEPTH.
  assert products(scan_blocks=True) < products() / 2


def test_scanned_blocks_are_initialised_one_by_one(stacked):
  kernels = stacked['params']['encoder']['blocks']['mlp_in']['kernel']
  assert kernels.shape == (_DEPTH, 8, 32)
  bound = (6 / (8 + 32)) ** 0.5  # of Xavier uniform on one block's matrix
  for one, other in itertools.combinations(kernels, 2):
    assert not np.any(one == other)
  assert 0.95 * bound < np.abs(kernels).max() <= bound


def test_unrolled_variables_stay_as_they_are(stacked):
  unrolled = unstack_blocks(stacked)
  assert 'blocks' not in str(jax.tree.structure(unrolled))
  jax.tree.map(np.testing.assert_array_equal, unstack_blocks(unrolled), unrolled)
