"""TAN's augmentations against versions that take one pixel at a time."""

import colorsys

import numpy as np
import pytest

from dpcap.data.augment import color_jitter, pad_crop


def picture(height=9, width=7, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_pad_crop_against_a_loop_over_pixels():
  image, padding = picture(), 4
  height, width = image.shape[:2]

  def reflected(i, size):
    i = -i if i < 0 else i
    return 2 * (size - 1) - i if i >= size else i

  seen = {}
  for seed in range(400):
    cropped = pad_crop(image, padding, np.random.default_rng(seed))
    assert cropped.shape == image.shape and cropped.dtype == np.uint8
    seen[cropped.tobytes()] = cropped
  expected = set()
  for top in range(-padding, padding + 1):
    for left in range(-padding, padding + 1):
      shifted = np.empty_like(image)
      for row in range(height):
        for column in range(width):
          source = reflected(row + top, height), reflected(column + left, width)
          shifted[row, column] = image[source]
      expected.add(shifted.tobytes())
  assert len(expected) == 81
  assert set(seen) <= expected and len(seen) > 70, 'all places, and no others'


def test_no_padding_is_the_image_itself():
  image = picture()
  np.testing.assert_array_equal(pad_crop(image, 0, np.random.default_rng()), image)


def slow_jitter(pixels, order, brightness, contrast, saturation, turn):
  """By the definitions, in floats that are rounded after each change."""
  grey_of = lambda p: 0.299 * p[..., 0] + 0.587 * p[..., 1] + 0.114 * p[..., 2]
  x = pixels.astype(float)
  for change in order:
    if change == 0:
      x = brightness * x
    elif change == 1:
      x = contrast * x + (1 - contrast) * grey_of(x).mean()
    elif change == 2:
      x = saturation * x + (1 - saturation) * grey_of(x)[..., None]
    else:
      for place in np.ndindex(x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*x[place] / 255)
        x[place] = 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    x = np.clip(x, 0, 255)
  return x


@pytest.mark.parametrize(
  'strength, allowed',
  [
    ((0.8, 0, 0, 0), 1.1),
    ((0, 0.8, 0, 0), 1.1),
    ((0, 0, 0.8, 0), 1.1),
    ((0, 0, 0, 0.2), 2),
    # Each change takes the last one's rounding further.
    ((0.8, 0.8, 0.8, 0.2), 3),
  ],
)
def test_color_jitter_against_its_definition(strength, allowed):
  for seed in range(12):
    image = picture(6, 5, seed)
    rng = np.random.default_rng(seed)
    rng.random()
    order = rng.permutation(4)
    factors = [rng.uniform(max(0, 1 - x), 1 + x) for x in strength[:3]]
    turn = rng.uniform(-strength[3], strength[3])
    expected = slow_jitter(image, order, *factors, turn)
    actual = color_jitter(image, *strength, 1.0, np.random.default_rng(seed))
    assert actual.shape == image.shape and actual.dtype == np.uint8
    # Pillow truncates after each change, and has 256 hues; so does the way there and back.
    error = np.abs(actual - expected)
    assert error.mean() < allowed, seed


def test_color_jitter_draws_from_the_whole_range_in_all_orders():
  grey = np.full((1, 1, 3), 100, np.uint8)
  rng = np.random.default_rng(0)
  values = np.array([color_jitter(grey, 0.8, 0, 0, 0, 1.0, rng)[0, 0, 0] for _ in range(400)])
  assert values.min() < 24 and values.max() > 176 and abs(values.mean() - 100) < 7
  # No factor is below zero: black would come up in a twelfth of them.
  values = np.array([color_jitter(grey, 1.2, 0, 0, 0, 1.0, rng)[0, 0, 0] for _ in range(400)])
  assert values.min() < 5 and 205 < values.max() <= 220 and np.mean(values == 0) < 0.04


def test_color_jitter_happens_with_its_probability():
  image = picture()
  rng = np.random.default_rng(0)
  changed = [color_jitter(image, 0.8, 0.8, 0.8, 0.2, 0.3, rng) is not image for _ in range(500)]
  assert 0.24 < np.mean(changed) < 0.36
  rng = np.random.default_rng(0)
  same = color_jitter(image, 0.0, 0.0, 0.0, 0.0, 1.0, rng)
  np.testing.assert_array_equal(same, image)
