"""From the bytes of an image file to the array that the model sees.

Everything goes through Pillow: it reads all formats that web data sets hold, and its resize is
the antialiased one that torchvision and timm, and so the reference recipe, use.
"""

import io
import math

import numpy as np
from PIL import Image

from dpcap.data.source import BadRecord

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

# 8192 x 8192: above any photograph in a web data set, 200 MB of RGB at worst.
MAX_PIXELS = 2**26

# Pillow would try some forty formats on hostile bytes, among them EPS, which runs Ghostscript.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')


def decode(image: bytes | np.ndarray, size_hint: int | None = None) -> Image.Image:
  """Decodes an image file into RGB.

  Of an animation it takes the first frame; transparent pixels become white; 16 bits a channel are
  scaled to 8; EXIF orientation is ignored, as in torchvision.

  Args:
    image: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file, or uint8 of shape (H, W, 3).
    size_hint: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep at
      least this many pixels. For a crop of at least area fraction s and ratio r, resized to
      `size`, `size / sqrt(s * r)` loses no detail.

  Returns:
    A Pillow image of mode RGB and at least one pixel.

  Raises:
    BadRecord: not an image, of zero size, truncated or damaged, or of more than `MAX_PIXELS`.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
      raise BadRecord(f'image array is {image.dtype} {image.shape}, expected uint8 (H, W, 3)')
    return Image.fromarray(image)
  try:
    # Opening reads the header only, so the size is known before any pixel is decoded.
    opened = Image.open(io.BytesIO(image), formats=_FORMATS)
    width, height = opened.size
    if not 0 < width * height <= MAX_PIXELS:
      raise BadRecord(f'image is {width} x {height}, more than {MAX_PIXELS} pixels or none')
    if size_hint:
      opened.draft(None, (size_hint, size_hint))
    opened.load()
    return _to_rgb(opened)
  except BadRecord:
    raise
  except MemoryError:
    raise
  except Exception as error:  # what Pillow raises on damaged files is no closed list
    raise BadRecord(f'image cannot be decoded: {type(error).__name__}: {error}') from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):  # I;16 and kin; Pillow's own conversion clips at 255
    grey = np.asarray(image, np.float32) / 257
    return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert('RGB')
  if image.mode == 'F':
    raise BadRecord('image holds floats of unknown range')
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image.convert('RGBA'))
    image = white
  return image.convert('RGB')


def random_resized_crop(
  image: Image.Image,
  size: int,
  rng: np.random.Generator,
  scale: tuple[float, float] = (0.2, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Cuts a random box out of the image and resizes it, as torchvision's RandomResizedCrop does.

  Args:
    image: mode RGB.
    size: side of the result in pixels.
    rng: where the box is drawn from.
    scale: range of the box's area as a fraction of the image's, uniform.
    ratio: range of the box's width / height, log-uniform.

  Returns:
    uint8 of shape (size, size, 3), bicubic with antialiasing.
  """
  left, top, width, height = _draw_box(image.width, image.height, rng, scale, ratio)
  # crop() first: resize(box=...) would let the filter reach pixels outside the box.
  cropped = image.crop((left, top, left + width, top + height))
  return np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC))


def _draw_box(image_width, image_height, rng, scale, ratio) -> tuple[int, int, int, int]:
  """Draws (left, top, width, height): ten attempts, then the largest centred box that may be."""
  for _ in range(10):
    area = image_width * image_height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < width <= image_width and 0 < height <= image_height:
      top = int(rng.integers(image_height - height + 1))
      left = int(rng.integers(image_width - width + 1))
      return left, top, width, height
  aspect = min(max(image_width / image_height, ratio[0]), ratio[1])
  width = min(image_width, round(image_height * aspect))
  height = min(image_height, round(image_width / aspect))
  return (image_width - width) // 2, (image_height - height) // 2, width, height


def random_flip(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors an (H, W, C) array left to right with probability one half (a view, no copy)."""
  return array[:, ::-1] if rng.random() < 0.5 else array


def resize_center_crop(image: Image.Image, size: int) -> np.ndarray:
  """The evaluation view of the MAE protocol: short side to size * 256 / 224, then the centre.

  Args:
    image: mode RGB.
    size: side of the result in pixels.

  Returns:
    uint8 of shape (size, size, 3), bicubic with antialiasing.
  """
  short = size * 256 // 224
  factor = short / min(image.size)
  box = []
  for side in image.size:
    resized = int(side * factor) if side > min(image.size) else short
    start = round((resized - size) / 2)
    box.append((start * side / resized, (start + size) * side / resized))
  (left, right), (top, bottom) = box
  # One resize of the box gives what resizing all and cropping would, but a 1 x 60000 image
  # does not become 256 x 15 million on the way.
  view = (left, top, right, bottom)
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=view))


def normalize(array):
  """Scales uint8 (..., 3), numpy or jax, to float32 of ImageNet's zero mean and unit deviation."""
  return (array / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD
