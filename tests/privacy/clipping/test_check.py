"""The check at start: passes what is right, names what is not."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy import clipping


def loss_fn(params, x):
  return jnp.sum(jnp.tanh(x @ params['layer']['kernel'] + params['layer']['bias']))


@pytest.fixture(name='inputs')
def _inputs(rng):
  layer = {'kernel': np.float32(rng.normal(size=(3, 4))), 'bias': np.zeros(4, np.float32)}
  return {'layer': layer}, np.float32(rng.normal(size=(2, 5, 3)))


@pytest.mark.parametrize('strategy', ['auto', *privacy.CLIPPING_STRATEGIES])
def test_passes_every_strategy(inputs, strategy):
  assert privacy.check_clipping(loss_fn, *inputs, strategy=strategy) <= 1e-5


def _halved_kernel(problem):
  result = clipping.CLIPPING_STRATEGIES['vmap'](problem)
  kernel = result.sum['layer']['kernel'] / 2
  return result._replace(sum={'layer': result.sum['layer'] | {'kernel': kernel}})


def _halved_norms(problem):
  result = clipping.CLIPPING_STRATEGIES['vmap'](problem)
  return result._replace(norms=result.norms / 2)


@pytest.mark.parametrize('wrong', [_halved_kernel, _halved_norms])
def test_refuses_a_strategy_with_another_answer(inputs, monkeypatch, wrong):
  monkeypatch.setitem(clipping.CLIPPING_STRATEGIES, 'wrong', wrong)
  with pytest.raises(privacy.ClippingMismatch, match=r"'wrong' differs from vmap by 0\.\d"):
    privacy.check_clipping(loss_fn, *inputs, strategy='wrong')


def _nan_in_sum(problem):
  result = clipping.CLIPPING_STRATEGIES['vmap'](problem)
  bias = result.sum['layer']['bias'] * jnp.nan
  return result._replace(sum={'layer': result.sum['layer'] | {'bias': bias}})


def _nan_in_norms(problem):
  result = clipping.CLIPPING_STRATEGIES['vmap'](problem)
  return result._replace(norms=result.norms * jnp.nan)


@pytest.mark.parametrize('wrong', [_nan_in_sum, _nan_in_norms])
def test_no_number_is_not_close(inputs, monkeypatch, wrong):
  monkeypatch.setitem(clipping.CLIPPING_STRATEGIES, 'wrong', wrong)
  with pytest.raises(privacy.ClippingMismatch, match="'wrong' differs from vmap by nan"):
    privacy.check_clipping(loss_fn, *inputs, strategy='wrong')


def test_names_the_parameter_that_differs_most(inputs, monkeypatch):
  monkeypatch.setitem(clipping.CLIPPING_STRATEGIES, 'wrong', _halved_kernel)
  with pytest.raises(privacy.ClippingMismatch, match='layer/kernel'):
    privacy.check_clipping(loss_fn, *inputs, strategy='wrong')


def test_a_loss_that_is_not_finite_is_refused(inputs):
  with pytest.raises(privacy.ClippingMismatch, match='norms .*nan'):
    privacy.check_clipping(lambda p, x: loss_fn(p, x) * jnp.nan, *inputs)
