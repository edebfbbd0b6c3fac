"""Times the drawing of `textures`, on one core.

    python -m tools.bench_textures [--image_size=224] [--images=200] [--rounds=5]

Prints one JSON line: {"image_size", "images", "images_per_cpu_s", "images_per_s"}, both of the best
round. All rounds draw the same images; on a machine that others load, processor time tells more.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import json
import time

from absl import app, flags

from dpcap import data

_IMAGE_SIZE = flags.DEFINE_integer('image_size', 224, 'Side in pixels.', lower_bound=1)
_IMAGES = flags.DEFINE_integer('images', 200, 'Images of a round, a program each.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds over all; the best counts.', lower_bound=1)


def main(_):
  source = data.Textures(split='train', size=_IMAGES.value, image_size=_IMAGE_SIZE.value)
  for index in range(20):  # the tables of noise, once
    source[index % len(source)]
  cpu, wall = [], []
  for _ in range(_ROUNDS.value):
    start = time.process_time(), time.perf_counter()
    for index in range(len(source)):
      source[index]
    cpu.append(time.process_time() - start[0])
    wall.append(time.perf_counter() - start[1])
  print(
    json.dumps(
      {
        'image_size': source.image_size,
        'images': len(source),
        'images_per_cpu_s': round(len(source) / min(cpu), 1),
        'images_per_s': round(len(source) / min(wall), 1),
      }
    )
  )


if __name__ == '__main__':
  app.run(main)
