"""Image-text pairs such as the web holds them, made up: for timing, where no shards are at hand."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

_WORDS = 'a the small red large blue square circle left of above and photo with green white'.split()


def make_jpeg(rng: np.random.Generator) -> bytes:
  """A JPEG of quality 85 and 300 to 800 px a side, some 50 kB.

  Its structure is that of photographs: amplitudes fall with about the inverse of the frequency,
  and colours vary less than brightness.
  """
  width, height = (int(side) for side in rng.integers(300, 801, 2))
  image = np.zeros((height, width, 3), np.float32)
  points, amplitude = 4, 1.0
  while points <= max(width, height):
    noise = rng.normal(size=(points, points, 3)).astype(np.float32)
    noise = 0.7 * noise.mean(axis=2, keepdims=True) + 0.3 * noise
    for channel in range(3):
      layer = Image.fromarray(noise[..., channel])
      resized = layer.resize((width, height), Image.Resampling.BICUBIC)
      image[..., channel] += amplitude * np.asarray(resized)
    points, amplitude = 2 * points, 0.55 * amplitude
  image = 120 + 50 * (image - image.mean()) / image.std() + rng.normal(0, 4, (height, width, 1))
  file = io.BytesIO()
  Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=85)
  return file.getvalue()


def make_shards(folder: pathlib.Path, images: int, shards: int = 4) -> None:
  """Writes tar shards with `images` pairs in all, in img2dataset's layout."""
  rng = np.random.default_rng(0)
  for number, part in enumerate(np.array_split(np.arange(images), shards)):
    with tarfile.open(folder / f'{number:05}.tar', 'w') as tar:
      for i in part:
        caption = ' '.join(rng.choice(_WORDS, 12))
        members = {'jpg': make_jpeg(rng), 'txt': caption.encode(), 'json': b'{"width": 512}'}
        for extension, content in members.items():
          info = tarfile.TarInfo(f'{i:09}.{extension}')
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
