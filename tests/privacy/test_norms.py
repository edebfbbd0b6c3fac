"""Bounds of norms.py against the worst that its model of arithmetic allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpcap import privacy
from dpcap.privacy import norms, outer_products
from dpcap.privacy.outer_products import Products, Rows
from tests.privacy.programs import CLIP_NORM, MARGIN, norm

U = 2.0**-24  # of float32


@pytest.mark.parametrize('at_once', [1, 4])  # in a loop over slices, and without
def test_slices_of_opposite_signs_are_bounded_each_by_itself(monkeypatch, at_once):
  monkeypatch.setattr(norms, '_SLICES_AT_ONCE', at_once)
  size = norms._SLICE
  # A large term first: every partial sum of a slice is nearly the whole slice.
  slice_ = np.float32([1, *np.full(size - 1, 1e-4)])
  x = np.concatenate([slice_, slice_])[None]
  y = np.concatenate([slice_, -slice_])[None]
  gram = norms._gram(jnp.asarray(x), jnp.asarray(y))
  partial_sums = 2 * np.sum(np.cumsum(np.float64(slice_) ** 2)[1:])
  assert gram.error[0, 0] >= U * partial_sums


def test_products_and_a_lookup_that_cancel_are_bounded_each_by_itself():
  tokens = 100
  g = np.float32([1, *np.full(tokens - 1, 1e-4)])[:, None]
  products = Products(jnp.ones((1, tokens, 1)), jnp.asarray(g)[None])
  rows = Rows(jnp.zeros(1, jnp.int32), -jnp.sum(jnp.asarray(g), keepdims=True)[:, :1])
  partial_sums = np.sum(np.cumsum(np.float64(g))[1:])
  assert np.sqrt(norms._of_unit([products, rows]).rounding) >= U * partial_sums


def test_a_scan_of_many_layers_adds_up_as_many_squares():
  layers = 1024

  def loss_fn(p, example):
    body = lambda y, wx: (y + jnp.sum(wx[1] @ wx[0]), None)
    return jax.lax.scan(body, jnp.float32(0), (p, example))[0]

  # Each square is just lost where it is added to 1.
  x = np.full((1, layers, 1, 1), np.sqrt(0.49 * 2 * U), np.float32)
  x[0, -1] = 1
  for strategy in privacy.CLIPPING_STRATEGIES:
    result = privacy.clipped_sum(
      loss_fn, jnp.ones((layers, 1, 1)), x, clip_norm=CLIP_NORM / 100, strategy=strategy
    )
    assert norm(result.sum) <= CLIP_NORM / 100 * MARGIN


def test_what_is_formed_is_formed_once_for_norm_and_sum(rng, monkeypatch):
  formed, times = outer_products.formed, []

  def formed_differently_each_time(*args):
    times.append(None)
    return formed(*args) * (1 + 0.1 * len(times))

  monkeypatch.setattr(outer_products, 'formed', formed_differently_each_time)
  x = np.float32(rng.normal(size=(1, 8, 3)))
  for strategy in privacy.CLIPPING_STRATEGIES:
    result = privacy.clipped_sum(
      lambda p, x: jnp.sum((x @ p) ** 2), jnp.ones((3, 2)), x, clip_norm=CLIP_NORM,
      strategy=strategy,
    )  # fmt: skip
    assert norm(result.sum) == pytest.approx(CLIP_NORM, rel=1e-4)
