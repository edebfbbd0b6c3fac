"""Times image decoders that could feed the model: decode, RandomResizedCrop, resize to 224.

    python -m tools.bench_decode [--images=100] [--rounds=3]

Prints one JSON line per decoder that can be imported:
{"decoder", "images_per_s", "ratio_to_pillow", "note"}. One thread each; all decoders get the same
images and boxes, round by round in turn.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import importlib.util
import io
import json
import statistics
import time

import numpy as np
from absl import app, flags
from PIL import Image

_IMAGES = flags.DEFINE_integer('images', 100, 'Number of generated JPEGs.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds over all; the median counts.', lower_bound=1)
_SIZE = 224


def make_jpegs(count: int, rng: np.random.Generator) -> list[bytes]:
  """JPEGs of 300 to 800 px a side at quality 85: smooth structure with noise."""
  jpegs = []
  for _ in range(count):
    width, height = (int(side) for side in rng.integers(300, 801, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + rng.normal(0, 8, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=85)
    jpegs.append(file.getvalue())
  return jpegs


def draw_box(jpeg: bytes, rng: np.random.Generator) -> tuple[int, int, int, int]:
  """A box (left, top, right, bottom) of area 0.2 to 1, clipped where it does not fit."""
  width, height = Image.open(io.BytesIO(jpeg)).size
  area = width * height * rng.uniform(0.2, 1)
  aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
  box_width = min(width, round(np.sqrt(area * aspect)))
  box_height = min(height, round(np.sqrt(area / aspect)))
  left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
  return left, top, left + box_width, top + box_height


def _pillow(jpeg, box):
  image = Image.open(io.BytesIO(jpeg)).convert('RGB').crop(box)
  return np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC))


def _opencv(interpolation):
  import cv2

  def decode(jpeg, box):
    left, top, right, bottom = box
    bgr = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[top:bottom, left:right]
    resized = cv2.resize(bgr, (_SIZE, _SIZE), interpolation=interpolation)
    return cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)

  return decode


def _simplejpeg_pillow(jpeg, box):
  import simplejpeg

  left, top, right, bottom = box
  rgb = simplejpeg.decode_jpeg(jpeg)[top:bottom, left:right]
  image = Image.fromarray(np.ascontiguousarray(rgb))
  return np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC))


def decoders():
  """Name -> (function of jpeg and box, note on the resampling) of what this machine can import."""
  found = {'pillow': (_pillow, 'antialiased bicubic; all formats')}
  if importlib.util.find_spec('simplejpeg'):
    note = 'antialiased bicubic; JPEG only, Pillow still needed'
    found['simplejpeg + pillow resize'] = (_simplejpeg_pillow, note)
  if importlib.util.find_spec('cv2'):
    import cv2

    cv2.setNumThreads(1)
    note = 'bicubic WITHOUT antialias: shrinking aliases'
    found['opencv bicubic'] = (_opencv(cv2.INTER_CUBIC), note)
    note = 'antialiased box filter when shrinking, not bicubic'
    found['opencv area'] = (_opencv(cv2.INTER_AREA), note)
  return found


def main(_):
  rng = np.random.default_rng(0)
  jpegs = make_jpegs(_IMAGES.value, rng)
  boxes = [draw_box(jpeg, rng) for jpeg in jpegs]
  found = decoders()
  seconds = {name: [] for name in found}
  errors = {}
  for _ in range(_ROUNDS.value):
    for name, (decode, _) in found.items():
      start = time.perf_counter()
      outputs = [decode(jpeg, box) for jpeg, box in zip(jpegs, boxes)]
      seconds[name].append(time.perf_counter() - start)
      if name == 'pillow':
        reference = outputs
      errors[name] = np.mean([np.abs(a.astype(int) - b) for a, b in zip(outputs, reference)])
  base = statistics.median(seconds['pillow'])
  for name, (_, note) in found.items():
    median = statistics.median(seconds[name])
    print(
      json.dumps(
        {
          'decoder': name,
          'images_per_s': round(len(jpegs) / median, 1),
          'ratio_to_pillow': round(base / median, 2),
          'note': f'{note}; mean difference from pillow {errors[name]:.2f} of 255',
        }
      )
    )


if __name__ == '__main__':
  app.run(main)
