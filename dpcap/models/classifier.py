"""What all classifiers are: an encoder of images, a linear head, cross-entropy with the label.

Nothing here mixes examples. Modules take one example or any leading axes; shape suffixes leave
those out.
"""

from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpcap.errors import UserError
from dpcap.key import POSITIVE, Key
from dpcap.models import keys
from dpcap.models.precision import at_least_float32


class Classifier(nn.Module):
  """Label of an image. A subclass says its KIND, its KEYS, and in `make_encoder` what they make.

  Use: `variables = model.init(key, image, label)`; all of them are trained (`variables['params']`,
  float32). Images are (..., H, W, 3), normalised floats; labels (...,) whole numbers.

  Attributes:
    encoder: module from images (..., H, W, 3) to float32 vectors (..., D).
    classes: how many there are.
    head_init: of the head's kernel; its bias starts at zero.
    dtype: compute type of the head. Features and loss use at least float32.
  """

  INPUTS = ('image', 'label')
  LOSS_UNIT = 'nats'
  # What `features` can be of.
  LAYERS = ('pooled',)
  # The top-level parameters that features depend on.
  FEATURE_PARTS = ('encoder',)

  encoder: nn.Module
  classes: int
  head_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: jnp.dtype = jnp.float32

  @classmethod
  def make(
    cls, *, image_size: int, vocab_size: int, remat: bool, classes: int, dtype: str, **own
  ) -> Self:
    """See `dpcap.models.make_model`; images may have any size, all activations are kept."""
    del image_size, vocab_size
    if remat:
      raise UserError('remat=True goes with transformers only; set mesh.remat to False')
    dtype = keys.DTYPES[keys.one_of('dtype', dtype, keys.DTYPES)]
    return cls(cls.make_encoder(dtype=dtype, **own), classes, dtype=dtype)

  @staticmethod
  def make_encoder(*, dtype: jnp.dtype, **own) -> nn.Module:
    """The encoder that a subclass's own KEYS describe.

    Raises:
      UserError: naming the key that is wrong.
    """
    raise NotImplementedError

  @nn.nowrap
  def about(self) -> str:
    """What it is, in words."""
    return f'{self.KIND} (a classifier of {self.classes} classes)'

  def setup(self):
    self.head = nn.Dense(self.classes, dtype=self.dtype, kernel_init=self.head_init)

  def features(self, image_HxWx3: jax.Array, layers: str = LAYERS[0]) -> jax.Array:
    """Image features for probing (..., D): what the head reads."""
    del layers  # there is one kind
    return self.encoder(image_HxWx3)

  def logits(self, image_HxWx3: jax.Array) -> jax.Array:
    """Float32 (..., classes)."""
    return at_least_float32(self.head(self.encoder(image_HxWx3)))

  def __call__(self, image_HxWx3: jax.Array, label: jax.Array) -> jax.Array:
    """Cross-entropy (...) of the label; NaN, which adds nothing, for one of `classes` or more."""
    logits_K = self.logits(image_HxWx3)
    of_label = jnp.take_along_axis(logits_K, label[..., None], axis=-1, mode='fill')[..., 0]
    return jax.nn.logsumexp(logits_K, axis=-1) - of_label


# The keys of every classifier.
KEYS = {
  'classes': Key(int, 10, 'how many labels the source has', check=POSITIVE),
  'dtype': keys.DTYPE,
}
