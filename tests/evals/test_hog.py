"""Histograms of oriented gradients, against what scikit-image computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpcap.evals.hog import hog


def _image():
  steps = np.add.outer(np.arange(16) ** 2, 3 * np.arange(16))[..., None] * np.array([1, 2, 3])
  image = (steps % 97).astype(np.float32)
  image[5:9, 3:11] = [200, 30, 90]
  return image


def test_features_are_those_of_scikit_image():
  # skimage.feature.hog 0.26 with pixels_per_cell=(4, 4), cells_per_block=(2, 2): the first block.
  expected = (
    '0.07416 0.08913 0.12361 0.16584 0.09889 0 0 0 0 0.09889 0.25593 0.16481 0.11056 0 0.08735 0'
    ' 0 0 0.46347 0 0.33413 0.19817 0.46347 0.12796 0 0 0 0 0 0 0 0.46347 0 0 0 0'
  )
  (found,) = np.asarray(hog(jnp.asarray(_image())[None], cell=4))
  assert found.shape == (3 * 3 * 36,)
  np.testing.assert_allclose(found[:36], np.array(expected.split(), float), atol=1e-5)
  assert found.sum() == pytest.approx(32.905472, abs=1e-4)


def test_every_image_has_its_own_and_an_even_one_has_none():
  images = np.stack([_image(), np.full((16, 16, 3), 7, np.float32), _image()[:, ::-1]])
  found = np.asarray(hog(jnp.asarray(images)))
  np.testing.assert_allclose(found[0], hog(jnp.asarray(_image())[None])[0], atol=1e-6)
  assert np.all(found[1] == 0) and not np.allclose(found[0], found[2])


@pytest.mark.parametrize('side, cells', [(16, 4), (32, 8), (224, 14), (230, 14)])
def test_a_cell_is_a_14th_of_the_image_and_at_least_4_pixels(side, cells):
  images = np.zeros((1, side, side, 3), np.float32)
  assert hog(jnp.asarray(images)).shape == (1, (cells - 1) ** 2 * 36)
