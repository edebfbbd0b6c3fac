"""`textures`: images by random programs, for pre-training that uses no data.

ViP and DP-Cap start from a model that saw Shaders21k alone (Baradad et al., 2022): images of
21,000 short OpenGL programs. Here the programs are drawn as well (`texture_programs`). Record i is
program i modulo their number in a view of its own, so that each program is seen in as many views.
Its caption tells what the program does, for example

    coarse sharp swirled stripes in red and teal over fine clouds in blue and white
"""

import dataclasses
import pathlib
from typing import ClassVar

from dpcap.data import texture_programs
from dpcap.data.drawn import DrawnSource
from dpcap.data.source import Record
from dpcap.key import POSITIVE, Key

# Every word of the captions: a WordPiece vocabulary that owes nothing to any data.
VOCABULARY_FILE = str(pathlib.Path(__file__).with_name('textures_vocabulary.txt'))


@dataclasses.dataclass(frozen=True)
class Textures(DrawnSource):
  """A source of `size` textures (see `DrawnSource`); labels tell the pattern of the upper layer.

  Attributes:
    programs: how many programs the images are of; each split has its own.

  Raises:
    UserError: as `DrawnSource`, and programs below 1.
  """

  KIND: ClassVar[str] = 'textures'
  KEY: ClassVar[int] = 0x7E97
  KEYS: ClassVar[dict[str, Key]] = {
    'split': Key(str, 'train', 'which textures', ('train', 'validation', 'test')),
    'size': Key(int, 1_000_000, 'how many textures', check=POSITIVE),
    'programs': Key(int, 21_000, 'how many programs they are of', check=POSITIVE),
  }

  programs: int = 21_000

  def __post_init__(self):
    super().__post_init__()
    self._check_positive('programs')

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the patterns."""
    return tuple(texture_programs.PATTERNS)

  def program(self, index: int) -> texture_programs.Program:
    """What draws record `index`."""
    return texture_programs.draw_program(self._rng(index % self.programs, stream=1))

  def _draw(self, index: int) -> Record:
    program, view = self.program(index), texture_programs.draw_view(self._rng(index))
    return Record(
      image=texture_programs.render(program, view, self.image_size),
      caption=texture_programs.caption(program),
      label=self.class_names.index(program.layers[0].pattern.name),
    )
