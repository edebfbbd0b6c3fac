import importlib
import io
import math
import struct
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpcap.data import image as image_module
from dpcap.data import image_folder, tar_shards
from dpcap.data.image import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  _draw_box,
  decode,
  normalize,
  open_image,
  random_flip,
  random_resized_crop,
  resize_center_crop,
)
from dpcap.data.source import BadRecord


def encode(image: Image.Image, format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
  coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_header(width: int, height: int) -> bytes:
  """A PNG that claims a size and holds almost no data."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  pixels = zlib.compress(bytes(1000))
  return (
    b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')
  )


# --- decode: what must be refused -----------------------------------------------------

JPEG = encode(photo(200, 100), 'JPEG')
PNG = encode(photo(200, 100), 'PNG')


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'<html>404 Not Found</html>',
        bytes(range(256)),
        JPEG[: len(JPEG) // 2],
        JPEG[:20],
        PNG[: len(PNG) // 2],
        PNG[:60] + bytes(200) + PNG[260:],
        encode(photo(64, 64), 'WEBP')[:80],
        b'GIF89a\x00\x00\x00\x00\x00\x00\x00',
        png_header(0, 10),
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n',
        encode(Image.fromarray(np.ones((4, 4), np.float32)), 'TIFF'),
        encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), 'TIFF'),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=[
        'empty', 'html', 'garbage', 'half JPEG', 'JPEG header', 'half PNG', 'damaged PNG', 'half WebP', 'GIF 0x0',
        'PNG 0x10', 'EPS', 'float TIFF', '32-bit TIFF', 'grey array', 'float array', 'empty array',
    ],
)  # fmt: skip
def test_unusable_images_are_bad_records(data):
  with pytest.raises(BadRecord):
    decode(data)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('side', [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused_by_their_header(side, monkeypatch):
  monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('pixels were decoded'))
  monkeypatch.setattr(
    'PIL.ImageFile.ImageFile.load', lambda self: pytest.fail('pixels were decoded')
  )
  with pytest.raises(BadRecord):
    decode(png_header(side, side))


# --- decode: what must come out right -------------------------------------------------


def colour(image: Image.Image) -> tuple[int, int, int]:
  assert image.mode == 'RGB'
  return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF'])
def test_formats_and_a_single_pixel(format):
  for size in [(1, 1), (33, 20)]:
    image = decode(encode(Image.new('RGB', size, (255, 0, 0)), format))
    assert image.size == size
    np.testing.assert_allclose(colour(image), (255, 0, 0), atol=3)


def test_cmyk_jpeg():
  pure_red = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
  np.testing.assert_allclose(
    colour(decode(encode(pure_red, 'JPEG', quality=95))), (255, 0, 0), atol=4
  )


def test_16_bit_grey_is_scaled_not_clipped():
  ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
  image = decode(encode(Image.fromarray(ramp), 'PNG'))
  assert image.mode == 'RGB'
  np.testing.assert_array_equal(np.asarray(image)[0, :, 1], np.arange(256))


def test_wide_modes_have_one_rule():
  """16 bits are scaled, whatever the file; 32 bits have no range that is known (above)."""
  for format in ('PNG', 'TIFF'):
    grey = encode(Image.fromarray(np.full((4, 4), 257 * 130, np.uint16)), format)
    assert colour(decode(grey)) == (130, 130, 130)


def with_chunk(kind: bytes, data: bytes) -> bytes:
  """PNG with one chunk more behind its header."""
  chunk = struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  return PNG[:33] + chunk + PNG[33:]


@pytest.mark.parametrize(
  'data',
  [
    with_chunk(b'zTXt', b'note\0\0' + zlib.compress(bytes(2**21))),
    with_chunk(b'iTXt', b'note\0\1\0\0\0' + zlib.compress(bytes(2**21))),
    with_chunk(b'iCCP', b'profile\0\0' + zlib.compress(bytes(2**21))),
    with_chunk(b'tEXt', b'note\0' + b'x' * 2**21),
    encode(photo(200, 100), 'PNG', icc_profile=bytes(2**21)),
    with_chunk(b'zTXt', b'no text'),
  ],
  ids=['zTXt', 'iTXt', 'iCCP', 'tEXt', 'profile', 'damaged text'],
)
def test_a_png_with_large_texts_or_profile_is_read(data):
  np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(photo(200, 100)))


@pytest.mark.parametrize('blanks', [b'\n', b'\r\n', b' \t\n'])
def test_blanks_before_an_image(blanks):
  for data in (JPEG, PNG, encode(photo(200, 100), 'AVIF')):
    np.testing.assert_array_equal(np.asarray(decode(blanks + data)), np.asarray(decode(data)))


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0, 'quality': 30}])
def test_a_jpeg_may_lack_its_end_marker_and_nothing_else(options):
  for seed in range(4):
    data = encode(web_photo(180, 130, seed), 'JPEG', **options)
    for cut in (data[:-2], data[:-1]):
      np.testing.assert_array_equal(np.asarray(decode(cut)), np.asarray(decode(data)))
      view = lambda d: random_resized_crop(open_image(d), 16, np.random.default_rng(1))
      np.testing.assert_array_equal(view(cut), view(data))
    for lost in (8, 40, 200, len(data) // 3, len(data) // 2):
      with pytest.raises(BadRecord, match='truncated'):
        decode(data[:-lost])


def test_a_flat_jpeg_cut_in_half_is_still_truncated():
  """Black and grey are what a decoder fills up with."""
  for grey in (0, 128):
    data = encode(Image.new('L', (400, 400), grey), 'JPEG')
    scan = data.index(b'\xff\xda')
    with pytest.raises(BadRecord, match='truncated'):
      decode(data[: (scan + len(data)) // 2])


def test_damaged_exif_is_not_worth_a_warning():
  """In a fresh module: pytest sets its own filters for every test."""
  exif = b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', 500) + b'\x12\x01' * 9
  data = encode(photo(20, 10), 'JPEG', exif=exif)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    Image.open(io.BytesIO(data))
    assert caught, 'this EXIF is damaged enough'
    caught.clear()
    fresh = importlib.reload(image_module)
    fresh.decode(data)
    assert not caught


def test_grey_palette_and_bilevel():
  assert colour(decode(encode(Image.new('L', (9, 9), 77), 'PNG'))) == (77, 77, 77)
  assert colour(decode(encode(Image.new('1', (9, 9), 1), 'PNG'))) == (255, 255, 255)
  green = Image.new('RGB', (9, 9), (0, 200, 0)).convert('P', palette=Image.Palette.ADAPTIVE)
  assert colour(decode(encode(green, 'PNG'))) == (0, 200, 0)


def test_transparency_becomes_white():
  half = decode(encode(Image.new('RGBA', (9, 9), (255, 0, 0, 128)), 'PNG'))
  np.testing.assert_allclose(colour(half), (255, 127, 127), atol=1)
  assert colour(decode(encode(Image.new('RGBA', (9, 9), (0, 0, 0, 0)), 'PNG'))) == (255, 255, 255)
  assert colour(decode(encode(Image.new('LA', (9, 9), (0, 0)), 'PNG'))) == (255, 255, 255)
  palette = Image.new('P', (9, 9), 0)
  palette.putpalette([0, 0, 0, 10, 20, 30])
  assert colour(decode(encode(palette, 'PNG', transparency=0))) == (255, 255, 255)


@pytest.mark.parametrize('format', ['GIF', 'WEBP'])
def test_of_an_animation_the_first_frame(format):
  frames = [Image.new('RGB', (16, 16), rgb) for rgb in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
  data = encode(frames[0], format, save_all=True, append_images=frames[1:])
  np.testing.assert_allclose(colour(decode(data)), (255, 0, 0), atol=3)


def test_arrays_pass_through():
  array = np.asarray(photo(7, 5))
  np.testing.assert_array_equal(np.asarray(decode(array)), array)


# --- reduced scale --------------------------------------------------------------------


def web_photo(width: int, height: int, seed: int = 0) -> Image.Image:
  """Structure of every size, as photographs have: each octave half as strong as the one above."""
  rng, image = np.random.default_rng(seed), 0
  for octave in range(1, 9):
    noise = rng.normal(128, 256 / 1.6**octave, (2**octave, 2**octave, 3)).clip(0, 255)
    coarse = Image.fromarray(noise.astype(np.uint8))
    layer = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image = image + (np.asarray(layer, np.float32) - 128) * 0.5
  return Image.fromarray((image + 128).clip(0, 255).astype(np.uint8))


def loaded_sizes(monkeypatch) -> list[tuple[int, int]]:
  """Sizes at which images get decoded from here on."""
  sizes, to_rgb = [], image_module._to_rgb
  monkeypatch.setattr(image_module, '_to_rgb', lambda x: sizes.append(x.size) or to_rgb(x))
  return sizes


@pytest.mark.parametrize('seed', range(12))
def test_large_boxes_of_jpegs_are_decoded_smaller_and_look_the_same(seed, monkeypatch):
  rng = np.random.default_rng(seed)
  size = (int(rng.integers(150, 500)), int(rng.integers(150, 500)))
  data = encode(web_photo(*size, seed), 'JPEG', quality=85, subsampling=2 * (seed % 2))
  left, top, width, height = _draw_box(*size, np.random.default_rng(seed), (0.2, 1), (3 / 4, 4 / 3))
  one, other = np.random.default_rng(seed), np.random.default_rng(seed)
  expected = random_resized_crop(decode(data), 48, one)
  sizes = loaded_sizes(monkeypatch)
  crop = random_resized_crop(open_image(data), 48, other)
  assert one.random() == other.random()  # what is drawn does not depend on it
  reduced = round(size[0] / sizes[0][0])
  # As far as the box allows, and no further.
  assert width / reduced >= 48 and height / reduced >= 48
  assert reduced == 8 or min(width, height) < 2 * reduced * 48
  difference = np.abs(crop.astype(int) - expected)
  if reduced == 1:
    assert not difference.any()
  else:
    assert 0 < difference.mean() < 1.5 and difference.max() < 24


def test_a_box_in_a_reduced_image_is_the_same_box(monkeypatch):
  """Also where its edges lie between pixels of the reduced image."""
  ramp = np.zeros((333, 477, 3), np.uint8)
  ramp[..., 0] = np.linspace(0, 255, 477)
  ramp[..., 1] = np.linspace(0, 255, 333)[:, None]
  data = encode(Image.fromarray(ramp), 'JPEG', quality=98, subsampling=0)
  sizes = loaded_sizes(monkeypatch)
  for seed in range(20):
    crop = random_resized_crop(open_image(data), 24, np.random.default_rng(seed)).astype(int)
    whole = random_resized_crop(decode(data), 24, np.random.default_rng(seed))
    # Half a pixel of the original is 0.3 here.
    np.testing.assert_allclose(crop.mean((0, 1)), whole.mean((0, 1)), atol=0.35)
  assert {round(477 / width) for width, _ in sizes} >= {1, 4, 8}


@pytest.mark.parametrize(
  'data',
  [
    encode(web_photo(450, 400), 'PNG'),
    encode(web_photo(450, 400), 'WEBP', quality=80),
    encode(web_photo(94, 94), 'JPEG'),
    np.asarray(web_photo(450, 400)),
  ],
  ids=['PNG', 'WebP', 'small JPEG', 'array'],
)
def test_images_without_need_are_untouched(data):
  for seed in range(5):
    expected = random_resized_crop(decode(data), 48, np.random.default_rng(seed))
    crop = random_resized_crop(open_image(data), 48, np.random.default_rng(seed))
    np.testing.assert_array_equal(crop, expected)
  np.testing.assert_array_equal(
    resize_center_crop(open_image(data), 48), resize_center_crop(decode(data), 48)
  )


@pytest.mark.parametrize('short, reduced', [(215, 1), (216, 2), (431, 2), (432, 4), (900, 8)])
def test_the_evaluation_view_keeps_twice_what_it_needs(short, reduced, monkeypatch):
  data = encode(web_photo(short, 920), 'JPEG', quality=85)
  expected = resize_center_crop(decode(data), 48)
  sizes = loaded_sizes(monkeypatch)
  difference = np.abs(resize_center_crop(open_image(data), 48).astype(int) - expected)
  assert sizes == [(math.ceil(short / reduced), 920 // reduced)]
  assert difference.mean() < 0.5 and difference.max() < 8
  assert reduced > 1 or not difference.any()


def test_damage_behind_the_header_is_found_at_any_scale():
  data = encode(web_photo(400, 400), 'JPEG')[:6000]
  opened = open_image(data)
  assert opened.size == (400, 400)
  for view in (
    lambda: random_resized_crop(opened, 48, np.random.default_rng(0)),
    lambda: resize_center_crop(open_image(data), 48),
  ):
    with pytest.raises(BadRecord, match='decoded'):
      view()


# --- crops ----------------------------------------------------------------------------


def torchvision_box(width, height, rng, scale, ratio):
  """RandomResizedCrop.get_params, transcribed apart from ours: (top, left, height, width)."""
  log_ratio = np.log(ratio)
  for _ in range(10):
    target_area = height * width * rng.uniform(scale[0], scale[1])
    aspect_ratio = np.exp(rng.uniform(log_ratio[0], log_ratio[1]))
    w = int(round(math.sqrt(target_area * aspect_ratio)))
    h = int(round(math.sqrt(target_area / aspect_ratio)))
    if 0 < w <= width and 0 < h <= height:
      i = rng.integers(0, height - h + 1)
      j = rng.integers(0, width - w + 1)
      return i, j, h, w
  in_ratio = width / height
  if in_ratio < min(ratio):
    w, h = width, int(round(width / min(ratio)))
  elif in_ratio > max(ratio):
    h, w = height, int(round(height * max(ratio)))
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize('seed', range(40))
def test_random_resized_crop_is_torchvisions(seed):
  rng = np.random.default_rng(seed)
  width, height = (int(side) for side in rng.integers(1, 300, 2))
  image = photo(width, height, seed)
  scale, ratio = [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 2.0))][seed % 2]
  top, left, h, w = torchvision_box(width, height, np.random.default_rng(seed), scale, ratio)
  box = np.asarray(image)[top : top + h, left : left + w].copy()
  expected = Image.fromarray(box).resize((32, 32), Image.Resampling.BICUBIC)
  cropped = random_resized_crop(image, 32, np.random.default_rng(seed), scale, ratio)
  assert cropped.shape == (32, 32, 3) and cropped.dtype == np.uint8
  np.testing.assert_array_equal(cropped, np.asarray(expected))


@pytest.mark.parametrize(
  'size, box',
  [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13)), ((1, 1), (0, 0, 1, 1))],
)
def test_extreme_shapes_fall_back_to_the_centre(size, box):
  assert _draw_box(*size, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3)) == box


def test_statistics_of_the_crop():
  """On an image whose pixels hold their own coordinates the box can be read from the crop."""
  side = 256
  ramp = np.zeros((side, side, 3), np.uint8)
  ramp[..., 0], ramp[..., 1] = np.arange(side), np.arange(side)[:, None]
  image, rng = Image.fromarray(ramp), np.random.default_rng(0)
  areas, log_ratios = [], []
  for _ in range(3000):
    # Up to 0.6 of the area every ratio fits, so no draw is rejected and the ranges are exact.
    crop = random_resized_crop(image, 32, rng, scale=(0.2, 0.6)).astype(float)
    width, height = (
      (crop[16, 28, 0] - crop[16, 4, 0]) / 24 * 32,
      (crop[28, 16, 1] - crop[4, 16, 1]) / 24 * 32,
    )
    areas.append(width * height / side**2)
    log_ratios.append(math.log(width / height))
  assert 0.19 < min(areas) < 0.21 and 0.59 < max(areas) < 0.61
  np.testing.assert_allclose(np.quantile(areas, [0.25, 0.5, 0.75]), [0.3, 0.4, 0.5], atol=0.015)
  assert max(np.abs(log_ratios)) < math.log(4 / 3) + 0.03
  quartiles = np.array([-0.5, 0, 0.5]) * math.log(4 / 3)
  np.testing.assert_allclose(np.quantile(log_ratios, [0.25, 0.5, 0.75]), quartiles, atol=0.02)


def test_shrinking_is_antialiased():
  stripes = np.zeros((512, 512, 3), np.uint8)
  stripes[:, ::2] = 255
  crop = random_resized_crop(
    Image.fromarray(stripes), 32, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1)
  )
  np.testing.assert_allclose(crop[:, 2:-2], 127.5, atol=4)


def test_random_flip():
  rng, array = np.random.default_rng(0), np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  flipped = [not np.array_equal(random_flip(array, rng), array) for _ in range(1000)]
  assert 430 < sum(flipped) < 570
  while np.array_equal(result := random_flip(array, rng), array):
    pass
  np.testing.assert_array_equal(result, array[:, ::-1])


@pytest.mark.parametrize(
  'size', [(300, 200), (200, 300), (256, 256), (50, 70), (1000, 333), (1, 1)]
)
def test_resize_center_crop_is_the_mae_protocol(size):
  image = photo(*size)
  width, height = size
  short = int(56 * 256 / 224)
  new = (
    (short, int(short * height / width))
    if width <= height
    else (int(short * width / height), short)
  )
  left, top = (int(round((side - 56) / 2)) for side in new)
  expected = image.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + 56, top + 56))
  result = resize_center_crop(image, 56)
  assert result.shape == (56, 56, 3) and result.dtype == np.uint8
  np.testing.assert_allclose(result.astype(int), np.asarray(expected), atol=1)


def test_a_very_long_image_is_cropped_before_it_grows():
  assert resize_center_crop(Image.new('RGB', (1, 60_000)), 224).shape == (224, 224, 3)


def test_normalize_on_numpy_and_jax():
  array = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
  expected = (array.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
  for result in (normalize(array), normalize(jnp.asarray(array))):
    assert result.dtype == np.float32
    np.testing.assert_allclose(np.asarray(result), expected, atol=1e-5)
  assert isinstance(normalize(array), np.ndarray)


def test_what_is_taken_for_an_image_is_of_a_format_that_is_read():
  Image.init()
  extensions = {*image_folder._EXTENSIONS, *(f'.{key}' for key in tar_shards.IMAGE_KEYS)}
  formats = {Image.registered_extensions()[extension] for extension in extensions}
  assert formats == set(image_module._FORMATS)
