"""What is known of the arrays of a reference implementation."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
  """How a PyTorch array becomes a flax one, and back; both take and return numpy arrays."""

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
DENSE = Layout(np.transpose, np.transpose)  # out x in <-> in x out
TOKEN = Layout(lambda x: x.reshape(x.shape[-1]), lambda x: x[None, None])  # 1 x 1 x D <-> D
TOKENS = Layout(lambda x: x.reshape(x.shape[-2:]), lambda x: x[None])  # 1 x T x D <-> T x D


def patch_layout(patch_size: int) -> Layout:
  """Convolution kernel out x 3 x p x p <-> Dense kernel over patches (p * p * 3) x out."""
  return Layout(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1),
  )


@dataclasses.dataclass
class Names:
  """The arrays of one model by the reference's names.

  Attributes:
    trained: name -> (path in 'params', layout).
    frozen: name -> (path in 'frozen', layout).
    positions: name -> (of an image rather than a text, width): what we compute.
    unused: name -> (whether it has a row for each token of a text rather than one, width): what
      checkpoints hold and no output depends on.
  """

  trained: dict[str, tuple[tuple[str, ...], Layout]] = dataclasses.field(default_factory=dict)
  frozen: dict[str, tuple[tuple[str, ...], Layout]] = dataclasses.field(default_factory=dict)
  positions: dict[str, tuple[bool, int]] = dataclasses.field(default_factory=dict)
  unused: dict[str, tuple[bool, int]] = dataclasses.field(default_factory=dict)

  def add_dense(self, name: str, *path: str, kernel: Layout = DENSE, bias: bool = True) -> None:
    """A trained Dense layer."""
    self.trained[f'{name}.weight'] = ((*path, 'kernel'), kernel)
    if bias:
      self.trained[f'{name}.bias'] = ((*path, 'bias'), SAME)

  def add_norm(self, name: str, *path: str) -> None:
    """A trained LayerNorm."""
    self.trained[f'{name}.weight'] = ((*path, 'scale'), SAME)
    self.trained[f'{name}.bias'] = ((*path, 'bias'), SAME)

  def add_encoder_block(self, name: str, *path: str, qkv_bias: bool) -> None:
    """A `vit.EncoderBlock`, which is timm's block."""
    self.add_norm(f'{name}.norm1', *path, 'attention_norm')
    self.add_dense(f'{name}.attn.qkv', *path, 'attention_qkv', bias=qkv_bias)
    self.add_dense(f'{name}.attn.proj', *path, 'attention_out')
    self.add_norm(f'{name}.norm2', *path, 'mlp_norm')
    self.add_dense(f'{name}.mlp.fc1', *path, 'mlp_in')
    self.add_dense(f'{name}.mlp.fc2', *path, 'mlp_out')
