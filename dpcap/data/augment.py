"""Augmentations of TAN and De et al. that keep an image's size, on uint8 (H, W, 3).

Sander et al. 2023 (arXiv 2210.03403) take both for ImageNet, padding 20 and jitter (0.8, 0.8, 0.8,
0.2) with probability 0.3, and the crop alone, padding 4, for CIFAR-10; a random flip goes between.
"""

import numpy as np
from PIL import Image, ImageEnhance


def pad_crop(array: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
  """Continues an image beyond its borders by reflection, and cuts its size out at random.

  As torchvision's RandomCrop with padding_mode 'reflect': pixels of the border itself come once.

  Args:
    array: uint8 (H, W, 3).
    padding: pixels at each side; all 2 padding + 1 places along a side are as likely.
    rng: draws the place.

  Returns:
    uint8 (H, W, 3).
  """
  height, width = array.shape[:2]
  top, left = rng.integers(2 * padding + 1, size=2)
  padded = np.pad(array, ((padding, padding), (padding, padding), (0, 0)), 'reflect')
  return padded[top : top + height, left : left + width]


def color_jitter(
  array: np.ndarray,
  brightness: float,
  contrast: float,
  saturation: float,
  hue: float,
  probability: float,
  rng: np.random.Generator,
) -> np.ndarray:
  """Changes the colours of an image at random, as torchvision's ColorJitter those of Pillow.

  Four changes in random order: a blend of the image with black, with the mean of its grey, with
  its own grey, each by a factor of its own (1: as it is), and a turn of the hue.

  Args:
    array: uint8 (H, W, 3).
    brightness, contrast, saturation: x, where the factor is uniform in [max(0, 1 - x), 1 + x].
    hue: h, where the turn is uniform in [-h, h], in turns; at most 0.5.
    probability: of any change at all.
    rng: draws whether, the order, and the four numbers.

  Returns:
    uint8 (H, W, 3).
  """
  if rng.random() >= probability:
    return array
  factor = lambda x: rng.uniform(max(0.0, 1 - x), 1 + x)
  order = rng.permutation(4)
  factors = [factor(brightness), factor(contrast), factor(saturation)]
  turn = rng.uniform(-hue, hue)
  changes = [
    lambda image: ImageEnhance.Brightness(image).enhance(factors[0]),
    lambda image: ImageEnhance.Contrast(image).enhance(factors[1]),
    lambda image: ImageEnhance.Color(image).enhance(factors[2]),
    lambda image: _turn_hue(image, turn),
  ]
  image = Image.fromarray(array)
  for i in order:
    if (brightness, contrast, saturation, hue)[i]:  # the way to HSV and back alone would round
      image = changes[i](image)
  return np.asarray(image)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
  hue, saturation, value = image.convert('HSV').split()
  turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)  # modulo 256
  bands = (Image.fromarray(turned), saturation, value)
  return Image.merge('HSV', bands).convert('RGB')
