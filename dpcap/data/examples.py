"""What a model is trained on: the fields of an example, made from a record.

A model asks for some of these fields:

- image: uint8 (H, W, 3); normalised on the device
- tokens: int32 (text_length,), the caption with [CLS], [SEP] and padding
- label: int32 (), a place in the source's class names
- key: uint32 (2,), random bits of this example in this step, for `jax.random.wrap_key_data`

With several views of a record (augmentation multiplicity), every field has them as its first axis.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dpcap.data import augment
from dpcap.data import image as image_ops
from dpcap.data.groups import Groups
from dpcap.data.source import BadRecord, Record, choose_caption
from dpcap.data.text import Tokenizer

# A field's name -> array, with any leading axes.
Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Field:
  """Shape and type of one field of one example."""

  shape: tuple[int, ...]
  dtype: type


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a record becomes an example.

  Attributes:
    image_size: side of the square image in pixels.
    text_length: tokens, with [CLS], [SEP] and padding.
    tokenizer: see `Tokenizer`.
    crop_scale: range of the area of a RandomResizedCrop, or None for the deterministic
      view that evaluation takes (an image that has the right size already stays as it is).
    pad_crop: pixels; the image is continued by so many at each side and its size cut out at random.
    flip: whether to mirror at random.
    color_jitter: brightness, contrast, saturation, hue and probability of `augment.color_jitter`.
    fields: what an example holds.
    views: how many times each record is augmented anew; above 1 fields have a leading axis.
  """

  image_size: int
  text_length: int
  tokenizer: Tokenizer
  crop_scale: tuple[float, float] | None = None
  pad_crop: int | None = None
  flip: bool = False
  color_jitter: tuple[float, ...] | None = None
  fields: tuple[str, ...] = ('image', 'tokens')
  views: int = 1

  @property
  def shapes(self) -> dict[str, Field]:
    """The fields of one example."""
    of_one_view = {
      'image': Field((self.image_size, self.image_size, 3), np.uint8),
      'tokens': Field((self.text_length,), np.int32),
      'label': Field((), np.int32),
      'key': Field((2,), np.uint32),
    }
    lead = (self.views,) if self.views > 1 else ()
    return {
      name: Field(lead + of_one_view[name].shape, of_one_view[name].dtype) for name in self.fields
    }

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
    """One example, without leading axes but that of its views.

    Args:
      record: of a source.
      rng: draws the view, the key and, of several captions, one; None: no augmentation,
        and the first caption.

    Raises:
      BadRecord: if a field cannot be had: the image cannot be decoded, there is no usable caption,
        or no label.
    """
    if self.views == 1:
      return self._view(record, rng)
    views = [self._view(record, rng) for _ in range(self.views)]
    return {name: np.stack([view[name] for view in views]) for name in self.fields}

  def _view(self, record: Record, rng: np.random.Generator | None) -> Example:
    make = {
      'image': lambda: self.view(record['image'], rng),
      'tokens': lambda: self.tokenizer.encode(
        choose_caption(record['caption'], rng), self.text_length
      ),
      'label': lambda: check_known(record['label']),
      'key': lambda: rng.integers(2**32, size=2, dtype=np.uint32),
    }
    # Captions first: most bad records are found without decoding an image.
    return {name: make[name]() for name in sorted(self.fields, reverse=True)}

  def view(self, image: bytes | np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """The image as uint8 (image_size, image_size, 3).

    Raises:
      BadRecord: if the image cannot be decoded.
    """
    size = self.image_size
    if self.crop_scale is not None:
      opened = image_ops.open_image(image)
      array = image_ops.random_resized_crop(opened, size, rng, self.crop_scale)
    elif isinstance(image, np.ndarray) and image.shape == (size, size, 3):
      array = image
    else:
      array = image_ops.resize_center_crop(image_ops.open_image(image), size)
    if self.pad_crop:
      array = augment.pad_crop(array, self.pad_crop, rng)
    if self.flip:
      array = image_ops.random_flip(array, rng)
    if self.color_jitter:
      array = augment.color_jitter(array, *self.color_jitter, rng)
    return array


def unit(fields: Sequence[str], groups: Groups | None = None) -> str:
  """What one record is to a model that takes these fields of it: the unit of privacy, in words.

  Args:
    fields: of an example.
    groups: of the source, where records are groups.
  """
  one = 'labelled image' if 'label' in fields else 'image'
  one = 'image-text pair' if 'tokens' in fields else one
  return groups.unit(one) if groups else one


def check_known(label: int) -> int:
  """The label, if there is one.

  Raises:
    BadRecord: there is none.
  """
  if label < 0:
    raise BadRecord('no label')
  return label
