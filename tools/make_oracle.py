"""Writes a small file of results of our own captioner, computed in float64.

  python -m tools.make_oracle FILE.npz

The layout is what tools.check_oracle reads: meta (JSON: sizes and names), param/NAME (float32,
the reference implementation's names, PyTorch layout), in/images, in/tokens, out/loss,
out/encoder, out/features, out/grad_norm, out/clip_norm, out/clipped_sum/NAME. Gradients are
taken example by example, then clipped and summed in numpy, so that the file is
independent of dpcap.privacy. It cannot catch an error in the model itself: that takes a
file made by the reference implementation.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dpcap.models import Captioner
from dpcap.models.positions import image_positions, text_positions
from dpcap.models.reference_weights import to_reference

# Sizes that differ wherever they can, so that a transposed array shows; a file under 100 KB.
IMAGE_SIZE, TEXT_LENGTH, BATCH = 12, 7, 4
SIZES = dict(
  vocab_size=19,
  patch_size=4,
  width=12,
  depth=1,
  heads=3,
  decoder_width=8,
  decoder_depth=1,
  decoder_heads=2,
)


def make_oracle(seed: int) -> dict[str, np.ndarray]:
  """The arrays of an oracle file by key. Needs jax_enable_x64."""
  rng = np.random.default_rng(seed)
  model = Captioner(**SIZES, dtype=jnp.float64)
  images = rng.normal(size=(BATCH, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
  tokens = _captions(rng)
  variables = jax.jit(model.init)(jax.random.key(seed), images[0], tokens[0])
  # Biases off zero and scales off one: no term of a gradient may vanish by its initial value.
  moved = jax.tree.map(
    lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), variables['params']
  )
  frozen = jax.tree.map(np.float32, variables['frozen'])
  variables = jax.tree.map(np.float64, {'params': moved, 'frozen': frozen})

  def loss_fn(params, image, tokens):
    return model.apply({**variables, 'params': params}, image, tokens)

  loss_and_grad = jax.jit(jax.value_and_grad(loss_fn))
  losses, grads = zip(
    *[
      loss_and_grad(variables['params'], image.astype(np.float64), row)
      for image, row in zip(images, tokens)
    ]
  )
  grads = [to_reference(grad, model) for grad in grads]
  norms = np.sqrt([sum(np.sum(g**2) for g in grad.values()) for grad in grads])
  clip_norm = np.mean(norms)  # some examples are clipped, some are not
  factors = np.minimum(1, clip_norm / norms)
  clipped = {name: sum(f * grad[name] for f, grad in zip(factors, grads)) for name in grads[0]}

  trained = to_reference(moved, model)
  untrained = _untrained(model, frozen, rng)
  meta = dict(
    **SIZES,
    image_size=IMAGE_SIZE,
    text_length=TEXT_LENGTH,
    trainable=list(trained),
    frozen=list(untrained),
  )
  apply = jax.jit(model.apply, static_argnames='method')
  outputs = {
    name: apply(variables, images.astype(np.float64), method=method)
    for name, method in (('out/encoder', 'encode'), ('out/features', 'features'))
  }
  return {
    'meta': np.array(json.dumps(meta)),
    **{f'param/{name}': x for name, x in (trained | untrained).items()},
    'in/images': np.moveaxis(images, -1, 1),
    'in/tokens': tokens,
    'out/loss': np.array(losses),
    **outputs,
    'out/grad_norm': norms,
    'out/clip_norm': clip_norm,
    **{f'out/clipped_sum/{name}': x for name, x in clipped.items()},
  }


def _captions(rng: np.random.Generator) -> np.ndarray:
  """Token ids (BATCH, TEXT_LENGTH): [CLS]=1, words, [SEP]=2, [PAD]=0; the first is full."""
  tokens = np.zeros((BATCH, TEXT_LENGTH), np.int32)
  for i, row in enumerate(tokens):
    words = TEXT_LENGTH - 2 - i
    row[: words + 2] = [1, *rng.integers(3, SIZES['vocab_size'], words), 2]
  return tokens


def _untrained(model: Captioner, frozen: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """The reference's frozen arrays, those it never uses included; float32."""
  flat = flatten_dict(frozen, sep='/')
  side = IMAGE_SIZE // model.patch_size
  draw = lambda width: rng.normal(scale=0.02, size=width)
  vectors = {
    'cls_token': flat['encoder/class_token'],
    'encoder_image_type_embedding': flat['encoder/type_embedding'],
    'decoder_image_type_embedding': flat['memory_type_embedding'],
    'decoder_text_type_embedding': flat['decoder/type_embedding'],
    'encoder_text_type_embedding': draw(model.width),
    'mask_token': draw(model.decoder_width),
    'mask_token_text': draw(model.decoder_width),
  }
  positions = {
    'pos_embed': image_positions(side, side, model.width),
    'decoder_pos_embed': image_positions(side, side, model.decoder_width),
    'text_pos_embed': text_positions(TEXT_LENGTH, model.width),
    'text_decoder_pos_embed': text_positions(TEXT_LENGTH, model.decoder_width),
  }
  arrays = {name: x[None] for name, x in vectors.items()} | positions
  return {name: np.float32(x[None]) for name, x in arrays.items()}


def main():
  parser = argparse.ArgumentParser(
    prog='python -m tools.make_oracle', description=__doc__.split('\n')[0]
  )
  parser.add_argument('file', help='the npz file to write')
  file = parser.parse_args().file
  jax.config.update('jax_enable_x64', True)
  np.savez_compressed(file, **make_oracle(seed=0))


if __name__ == '__main__':
  main()
