"""From the bytes of an image file to the array that the model sees.

Everything goes through Pillow: it reads all formats that web data sets hold, and its resize is
the antialiased one that torchvision and timm, and so the reference recipe, use.
"""

import contextlib
import io
import math
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from dpcap.data.source import BadRecord

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

# 8192 x 8192: above any photograph in a web data set, 200 MB of RGB at worst.
MAX_PIXELS = 2**26

# Pillow would try some forty formats on hostile bytes, among them EPS, which runs Ghostscript.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF')

_END_OF_JPEG = b'\xff\xd9'
# No marker among them, nor a run of zeros: as frequencies they are noise.
_OTHER_BITS = bytes(range(1, 128))
_PNG = b'\x89PNG\r\n\x1a\n'
# Parts of a PNG that do not bear on its pixels here: texts and the colour profile.
_NOTES = (b'tEXt', b'zTXt', b'iTXt', b'iCCP')

# Pillow warns of damage in what is not used here, such as EXIF, and of sizes, which are checked.
warnings.filterwarnings('ignore', module=r'PIL\.')


def open_image(image: bytes | np.ndarray) -> Image.Image:
  """Reads the header of an image file; its pixels are decoded when they are needed.

  Args:
    image: the bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file, or uint8 of shape (H, W, 3).
      Blanks and line ends before them, as some programs leave, are passed over.

  Returns:
    A Pillow image of its true size and any mode, for `decode` or one of the views below.

  Raises:
    BadRecord: not an image, of zero size, or of more than `MAX_PIXELS`.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
      raise BadRecord(f'image array is {image.dtype} {image.shape}, expected uint8 (H, W, 3)')
    return Image.fromarray(image)
  with _bad_record_if_damaged():
    opened = Image.open(io.BytesIO(_without_notes(image.lstrip())), formats=_FORMATS)
    width, height = opened.size
  if not 0 < width * height <= MAX_PIXELS:
    raise BadRecord(f'image is {width} x {height}, more than {MAX_PIXELS} pixels or none')
  return opened


def decode(image: bytes | np.ndarray) -> Image.Image:
  """Decodes an image file into RGB.

  Of an animation it takes the first frame; transparent pixels become white; 16 bits a channel are
  scaled to 8, wider numbers, whose range nobody tells, are refused; EXIF orientation and colour
  profiles are ignored, as in torchvision. A JPEG may lack its end marker.

  Args:
    image: as `open_image` takes it.

  Returns:
    A Pillow image of mode RGB and at least one pixel.

  Raises:
    BadRecord: as `open_image`, or truncated or damaged.
  """
  return _load(open_image(image), 1)[0]


def _without_notes(image: bytes) -> bytes:
  """The image; a PNG without its texts and profile, which Pillow refuses from 1 MB on."""
  if not image.startswith(_PNG):
    return image
  kept, start, at = [], 0, len(_PNG)
  while at + 12 <= len(image):
    stop = at + 12 + int.from_bytes(image[at : at + 4])
    if image[at + 4 : at + 8] in _NOTES and stop <= len(image):
      kept.append(image[start:at])
      start = stop
    at = stop
  return b''.join((*kept, image[start:])) if kept else image


def _load(image: Image.Image, reduction: int) -> tuple[Image.Image, int]:
  """An opened image in RGB, and by what its sides were divided: at most `reduction`.

  A JPEG is made of 8 x 8 blocks of frequencies, of which the decoder can take the low ones alone:
  that gives the image at 1/2, 1/4 or 1/8 of its sides for less work. Other formats stay whole.
  """
  with _bad_record_if_damaged():
    try:
      return _load_whole(image, reduction)
    except OSError:
      if image.format != 'JPEG':
        raise
      # Where only the end marker is missing, what follows the data makes no pixel.
      data = image.fp.getvalue()
      ends = (_END_OF_JPEG, _OTHER_BITS + _END_OF_JPEG)
      (rgb, scale), (other, _) = (
        _load_whole(Image.open(io.BytesIO(data + end), formats=('JPEG',)), reduction)
        for end in ends
      )
      if rgb.tobytes() != other.tobytes():
        raise
      return rgb, scale


def _load_whole(image: Image.Image, reduction: int) -> tuple[Image.Image, int]:
  scale = 1
  if reduction >= 2:
    power = min(8, 1 << (reduction.bit_length() - 1))
    full = image.width
    drafted = image.draft(None, (image.width // power, image.height // power))
    scale = round(full / drafted[1][2]) if drafted else 1
  image.load()
  return _to_rgb(image), scale


@contextlib.contextmanager
def _bad_record_if_damaged():
  try:
    yield
  except (BadRecord, MemoryError):
    raise
  except UnidentifiedImageError as error:
    raise BadRecord(f'not an image of a known format ({", ".join(_FORMATS)})') from error
  except Exception as error:  # what Pillow raises on damaged files is no closed list
    raise BadRecord(f'image cannot be decoded: {type(error).__name__}: {error}') from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode in ('I', 'F'):
    raise BadRecord(f'image holds numbers of 32 bits, of unknown range (mode {image.mode})')
  if image.mode.startswith('I;16'):  # Pillow's own conversion clips at 255
    grey = np.asarray(image, np.float32) / 257
    return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert('RGB')
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

  The box is drawn on the true size, which the header gives. Where it is at least twice as large as
  the result, a JPEG is decoded at a reduced scale that leaves the box no smaller than the result.

  Args:
    image: opened or decoded.
    size: side of the result in pixels.
    rng: where the box is drawn from.
    scale: range of the box's area as a fraction of the image's, uniform.
    ratio: range of the box's width / height, log-uniform.

  Returns:
    uint8 of shape (size, size, 3), bicubic with antialiasing.

  Raises:
    BadRecord: truncated or damaged.
  """
  left, top, width, height = _draw_box(image.width, image.height, rng, scale, ratio)
  rgb, reduced = _load(image, min(width, height) // size)
  box = [side / reduced for side in (left, top, left + width, top + height)]
  outer = [*map(math.floor, box[:2]), *map(math.ceil, box[2:])]
  # crop() first: resize(box=...) alone would let the filter reach pixels outside the box.
  cropped = rgb.crop(outer)
  inner = (box[0] - outer[0], box[1] - outer[1], box[2] - outer[0], box[3] - outer[1])
  return np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC, box=inner))


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
  """Mirrors an (H, W, C) array left to right with probability one half; else returns it as it is."""
  if rng.random() >= 0.5:
    return array
  flipped = np.empty_like(array)
  # Channel by channel: in one piece numpy takes five times as long, a tenth of what decoding does.
  for channel in range(array.shape[2]):
    flipped[..., channel] = array[:, ::-1, channel]
  return flipped


def resize_center_crop(image: Image.Image, size: int) -> np.ndarray:
  """The evaluation view of the MAE protocol: short side to size * 256 / 224, then the centre.

  A JPEG is decoded at a reduced scale that leaves it at least twice as large as it is needed: what
  evaluations are compared by should not depend on how fast they are.

  Args:
    image: opened or decoded.
    size: side of the result in pixels.

  Returns:
    uint8 of shape (size, size, 3), bicubic with antialiasing.

  Raises:
    BadRecord: truncated or damaged.
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
  rgb, reduced = _load(image, min(image.size) // (2 * short))
  view = [side / reduced for side in (left, top, right, bottom)]
  return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=view))


def normalize(array):
  """Scales uint8 (..., 3), numpy or jax, to float32 of ImageNet's zero mean and unit deviation."""
  return (array / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD
