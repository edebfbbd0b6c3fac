"""Times zero-shot classification by likelihood against a forward for every image and label.

    python -m tools.bench_zero_shot [--size=nano] [--labels=1000] [--images=2] [--rounds=3]
        [--reference_labels=8]

`cached` is `dpcap.evals.zero_shot`: the encoder once an image, the prompt once an image, then what
differs between labels. `reference` is the reference implementation's way: the whole captioner for
every pair of an image and a label, texts padded to 40 tokens. It is timed on a physical batch of
`reference_labels` pairs of one image, and its rate at all labels is extrapolated from that: the
work is the same for every pair. Both are timed in turn, in each round; weights, images and
labels are random (labels of one to four tokens after a prompt of six, vocabulary 30,522).

Prints a JSON line each to stdout: `method`, `images_per_s` (median over rounds), `ratio` to the
reference in the same round (median) and its `range`, `size`, `labels`, `device`.
Exits 2 if an option is wrong.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import json
import statistics
import sys
import time

import jax
import numpy as np

from dpcap import models
from dpcap.errors import UserError
from dpcap.evals.likelihood import text_losses
from tools.arguments import Parser, program

_VOCABULARY, _TEXT_LENGTH = 30_522, 40
_CLS, _SEP = 101, 102
_PROMPT = 6


def make_texts(labels: int, rng: np.random.Generator) -> list[list[int]]:
  """[CLS] prompt label [SEP] for each label: one prompt, labels of one to four tokens."""
  draw = lambda n: rng.integers(1000, _VOCABULARY, n).tolist()
  prompt = [_CLS, *draw(_PROMPT)]
  return [[*prompt, *draw(rng.integers(1, 5)), _SEP] for _ in range(labels)]


@program
def main(argv: list[str] | None) -> None:
  """Times both methods and prints it."""
  parser = Parser('tools.bench_zero_shot', __doc__)
  parser.add_argument('--size', default='nano', choices=models.SIZES)
  parser.add_argument('--image_size', type=int, default=224)
  for name, default in dict(labels=1000, images=2, rounds=3, reference_labels=8).items():
    parser.add_argument(f'--{name}', type=int, default=default)
  options = parser.parse_args(argv)
  for name in ('image_size', 'labels', 'images', 'rounds', 'reference_labels'):
    if getattr(options, name) < 1:
      raise UserError(f'--{name} is {getattr(options, name)}; it must be at least 1')
  if options.reference_labels > options.labels:
    raise UserError('--reference_labels is above --labels; it must be a part of them')

  rng = np.random.default_rng(0)
  size, image_size = options.size, options.image_size
  model = models.make_model('captioner', size=size, image_size=image_size, vocab_size=_VOCABULARY)
  images = rng.normal(size=(options.images, image_size, image_size, 3)).astype(np.float32)
  texts = make_texts(options.labels, rng)
  some = [np.pad(text, (0, _TEXT_LENGTH - len(text))) for text in texts]
  some = np.array(some[: options.reference_labels], np.int32)
  keys = {'params': jax.random.key(0), 'frozen': jax.random.key(1)}
  variables = jax.jit(model.init)(keys, images[0], some[0])

  # Variables are arguments: as constants they would be compiled into the program.
  @jax.jit
  def cached(variables, images):
    memory = model.apply(variables, images, method='memory')
    return text_losses(model, variables, memory, texts)

  pairs = np.repeat(images[:1], len(some), axis=0)
  whole = jax.jit(model.apply)

  def timed(function, *inputs):
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start

  timed(cached, variables, images)
  timed(whole, variables, pairs, some)
  rates = {'reference': [], 'cached': []}
  for _ in range(options.rounds):
    seconds = timed(whole, variables, pairs, some)
    rates['reference'].append(len(some) / options.labels / seconds)
    rates['cached'].append(options.images / timed(cached, variables, images))
  for method, rate in rates.items():
    ratios = [a / b for a, b in zip(rate, rates['reference'])]
    line = {
      'method': method,
      'images_per_s': statistics.median(rate),
      'ratio': statistics.median(ratios),
      'range': [min(ratios), max(ratios)],
      'size': size,
      'labels': options.labels,
      'device': jax.devices()[0].device_kind,
    }
    print(json.dumps(line))


if __name__ == '__main__':
  sys.exit(main())
