"""What is trained: models as flax modules, made from plain arguments.

A model is a `flax.linen.Module` whose call is the loss of one example (or of any leading
axes), with trained parameters in the collection 'params' and constants in 'frozen'. Its class says

- INPUTS: the fields of an example that the call takes, in order: of 'image' (normalised floats
  (..., H, W, 3)), 'tokens' (..., L), 'label' (...,) and 'key' (..., 2), random bits of the
  example's own in this step, for `jax.random.wrap_key_data`;
- LOSS_UNIT: what the loss is in, for people;
- KEYS: its own entries of the config's section `model`;
- make(image_size, vocab_size, remat, **keys): the module, or a UserError that names the key;
- about(): what it is, in words that begin with its kind;
- features(images, layers): what evaluations take of it, float32 (..., D); LAYERS lists of which
  layers it can be, the default first.

What else an evaluation needs it looks for by name, as `logits` or `text_loss`.
"""

import flax.linen as nn

from dpcap.errors import UserError
from dpcap.models.blocks import stack_blocks, unstack_blocks
from dpcap.models.captioner import PADDING, Captioner
from dpcap.models.keys import one_of
from dpcap.models.mae import MAE
from dpcap.models.mlp import MLP
from dpcap.models.nf_resnet import NFResNet
from dpcap.models.sizes import SIZES, Size
from dpcap.models.wide_resnet import WideResNet

__all__ = [
  'Captioner',
  'MAE',
  'MODELS',
  'PADDING',
  'SIZES',
  'Size',
  'make_model',
  'stack_blocks',
  'unstack_blocks',
]

# name in the config -> class
MODELS = {
  'captioner': Captioner,
  'mae': MAE,
  'wide_resnet': WideResNet,
  'nf_resnet': NFResNet,
  'mlp': MLP,
}


def make_model(
  name: str, *, image_size: int, vocab_size: int, remat: bool = False, **keys
) -> nn.Module:
  """A model by name; nothing is initialised.

  Args:
    name: key of `MODELS`.
    image_size: side of the square input images, pixels.
    vocab_size: number of token ids of the tokenizer.
    remat: compute the inside of every block again in the backward pass.
    **keys: of the model's KEYS; those left out take their defaults.

  Raises:
    UserError: naming the argument, its value and what is allowed.
  """
  model = MODELS[one_of('model', name, MODELS)]
  if vocab_size < 1:
    raise UserError(f'vocab_size={vocab_size} must be at least 1')
  keys = {key: entry.default for key, entry in model.KEYS.items()} | keys
  return model.make(image_size=image_size, vocab_size=vocab_size, remat=remat, **keys)
