"""Writes a small file of results of one of our own models, computed in float64.

  python -m tools.make_oracle FILE.npz [--model=mae]

The layout is what tools.check_oracle reads: meta (JSON: sizes and names), param/NAME (float32,
the reference implementation's names, PyTorch layout), and of a captioner in/images, in/tokens,
out/loss, out/encoder, out/features, out/grad_norm, out/clip_norm, out/clipped_sum/NAME; of a masked
autoencoder in/images, in/mask_noise, out/loss, out/encoder, out/prediction, out/block_means, and
the last three for each set of trained parameters, out/all/... and out/fixed_positions/...
Gradients are taken example by example, then clipped and summed in numpy, so that the file is
independent of dpcap.privacy. It cannot catch an error in the model itself: that takes a
file made by the reference implementation.
"""

import dpcap.ending  # noqa: F401, I001  before what takes long

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dpcap.models import MAE, Captioner
from dpcap.models.positions import image_positions, text_positions
from dpcap.models.reference_weights import to_reference
from tools.arguments import Parser, program

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
  """The arrays of a captioner's file by key. Needs jax_enable_x64."""
  rng = np.random.default_rng(seed)
  model = Captioner(**SIZES, dtype=jnp.float64)
  images = rng.normal(size=(BATCH, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
  tokens = _captions(rng)
  variables = jax.jit(model.init)(jax.random.key(seed), images[0], tokens[0])
  moved = _moved(variables['params'], rng)
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
    **_clipped('out/', [to_reference(grad, model) for grad in grads]),
  }


def make_mae_oracle(seed: int) -> dict[str, np.ndarray]:
  """The arrays of a masked autoencoder's file by key. Needs jax_enable_x64."""
  rng = np.random.default_rng(seed)
  sizes = {name: size for name, size in SIZES.items() if name != 'vocab_size'}
  model = MAE(**sizes, train_positions=True, dtype=jnp.float64)
  images = rng.normal(size=(BATCH, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
  noise = rng.random((BATCH, (IMAGE_SIZE // model.patch_size) ** 2), np.float32)
  init = jax.jit(functools.partial(model.init, method='loss'))
  params = _moved(init(jax.random.key(seed), images[0], noise[0])['params'], rng)

  @jax.jit
  def of_one(params, image, noise):
    loss_fn = lambda params: model.apply({'params': params}, image, noise, method='loss')
    variables = {'params': params}
    outputs = {
      'out/encoder': model.apply(variables, image, noise, method='encode'),
      'out/prediction': model.apply(variables, image, noise, method='paint')[0],
      'out/block_means': model.apply(variables, image, layers='all_blocks', method='features'),
    }
    loss, grad = jax.value_and_grad(loss_fn)(params)
    return outputs | {'out/loss': loss}, grad

  wide = jax.tree.map(np.float64, params)
  outputs, grads = zip(*[of_one(wide, *one) for one in zip(images.astype(np.float64), noise)])
  meta = dict(**sizes, mask_ratio=model.mask_ratio, image_size=IMAGE_SIZE)
  of_set = lambda model: [to_reference(grad, model) for grad in grads]
  return {
    'meta': np.array(json.dumps(meta)),
    **{f'param/{name}': x for name, x in to_reference(params, model).items()},
    'in/images': np.moveaxis(images, -1, 1),
    'in/mask_noise': noise,
    **{name: np.stack([out[name] for out in outputs]) for name in outputs[0]},
    **_clipped('out/all/', of_set(model)),
    **_clipped('out/fixed_positions/', of_set(model.clone(train_positions=False))),
  }


def _moved(params: dict, rng: np.random.Generator) -> dict:
  """Biases off zero and scales off one: no term of a gradient may vanish by its initial value."""
  return jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)


def _clipped(prefix: str, grads: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Norms of the examples' gradients, the clip norm, and the sum of the clipped gradients."""
  norms = np.sqrt([sum(np.sum(g**2) for g in grad.values()) for grad in grads])
  clip_norm = np.mean(norms)  # some examples are clipped, some are not
  factors = np.minimum(1, clip_norm / norms)
  clipped = {name: sum(f * grad[name] for f, grad in zip(factors, grads)) for name in grads[0]}
  return {
    f'{prefix}grad_norm': norms,
    f'{prefix}clip_norm': clip_norm,
    **{f'{prefix}clipped_sum/{name}': x for name, x in clipped.items()},
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


@program
def main(argv: list[str] | None) -> None:
  """Writes the file that the arguments name."""
  parser = Parser('tools.make_oracle', __doc__)
  parser.add_argument('file', help='the npz file to write')
  parser.add_argument('--model', choices=['captioner', 'mae'], default='captioner')
  arguments = parser.parse_args(argv)
  jax.config.update('jax_enable_x64', True)
  make = make_mae_oracle if arguments.model == 'mae' else make_oracle
  np.savez_compressed(arguments.file, **make(seed=0))


if __name__ == '__main__':
  sys.exit(main())
