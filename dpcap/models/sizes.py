"""The sizes a captioner comes in."""

from typing import NamedTuple


class Size(NamedTuple):
  """Shape of a captioner; `patch_size` is the default, which `make_model` can override."""

  patch_size: int
  width: int
  depth: int
  heads: int
  decoder_width: int
  decoder_depth: int
  decoder_heads: int


# All but the first three are the sizes of the reference implementation (Sander et al. 2024).
SIZES = {
  'micro': Size(8, 16, 1, 2, 16, 1, 2),  # for tests: compiles in a moment
  'demo': Size(8, 64, 2, 4, 64, 1, 4),  # for images of 32 px: 0.2M parameters
  'demo_wide': Size(8, 128, 2, 4, 128, 1, 4),
  'nano': Size(16, 192, 12, 6, 192, 6, 6),
  'tiny': Size(16, 384, 12, 6, 384, 6, 6),
  'small': Size(16, 576, 12, 12, 576, 6, 12),
  'base': Size(16, 768, 12, 12, 768, 6, 12),
  'large': Size(16, 1024, 24, 16, 768, 6, 12),
}
