"""`scenes`: captioned scenes of coloured shapes, drawn from the index alone.

A scene has one to four objects on a 2 x 2 grid, exactly one of them large. Its caption
goes from object to object by spatial relations, for example

    a small red ring left of a large blue square above a small green cross

so that attributes are bound to objects and objects to places. Backgrounds, shades and
positions vary and are not told.
"""

import dataclasses
import pathlib
from typing import ClassVar, NamedTuple

import numpy as np

from dpcap.data.drawn import DrawnSource
from dpcap.data.source import Record
from dpcap.key import POSITIVE, Key

COLORS = {
  'red': (220, 40, 40),
  'orange': (245, 140, 30),
  'yellow': (240, 220, 50),
  'green': (50, 170, 70),
  'cyan': (60, 200, 210),
  'blue': (50, 80, 210),
  'purple': (140, 60, 180),
  'white': (240, 240, 240),
}
SHAPES = ('circle', 'square', 'triangle', 'cross', 'ring')
SIZES = ('small', 'large')
MAX_OBJECTS = 4

# Every word of the grammar: a WordPiece vocabulary that owes nothing to any data.
VOCABULARY_FILE = str(pathlib.Path(__file__).with_name('scenes_vocabulary.txt'))


class Thing(NamedTuple):
  """One object: attributes as words, centre and radius in units of the image side."""

  size: str
  color: str
  shape: str
  x: float
  y: float
  radius: float


class Scene(NamedTuple):
  """Objects in caption order, and the relation of each to the next."""

  things: tuple[Thing, ...]
  relations: tuple[str, ...]

  @property
  def large(self) -> Thing:
    """The one large object."""
    return next(thing for thing in self.things if thing.size == 'large')


# What a probe can be asked: name -> (class names, scene -> class name).
LABELS = {
  'color': (tuple(COLORS), lambda scene: scene.large.color),
  'shape': (SHAPES, lambda scene: scene.large.shape),
  'count': (('1', '2', '3', '4'), lambda scene: str(len(scene.things))),
  'color_shape': (
    tuple(f'{color} {shape}' for color in COLORS for shape in SHAPES),
    lambda scene: f'{scene.large.color} {scene.large.shape}',
  ),
}


@dataclasses.dataclass(frozen=True)
class Scenes(DrawnSource):
  """A source of `size` scenes (see `DrawnSource`).

  Attributes:
    label: which question the labels answer, a key of LABELS.

  Raises:
    UserError: as `DrawnSource`, and an unknown label.
  """

  KIND: ClassVar[str] = 'scenes'
  KEY: ClassVar[int] = 0x5CE9E5
  KEYS: ClassVar[dict[str, Key]] = {
    'split': Key(str, 'train', 'which scenes', ('train', 'validation', 'test')),
    'size': Key(int, 100_000, 'how many scenes', check=POSITIVE),
    'label': Key(str, 'color', 'what the label tells', tuple(LABELS)),
  }

  label: str = 'color'

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('label', tuple(LABELS))

  @property
  def class_names(self) -> tuple[str, ...]:
    """Names of the label's classes."""
    return LABELS[self.label][0]

  def scene(self, index: int) -> Scene:
    """What is in record `index`."""
    return _draw_scene(self._rng(index))

  def _draw(self, index: int) -> Record:
    rng = self._rng(index)
    scene = _draw_scene(rng)
    return Record(
      image=_render(scene, self.image_size, rng),
      caption=caption(scene),
      label=self.class_names.index(LABELS[self.label][1](scene)),
    )


def caption(scene: Scene) -> str:
  """The scene in words."""
  words = []
  for i, thing in enumerate(scene.things):
    words.append(f'a {thing.size} {thing.color} {thing.shape}')
    words += scene.relations[i : i + 1]
  return ' '.join(words)


def _draw_scene(rng: np.random.Generator) -> Scene:
  count = int(rng.integers(1, MAX_OBJECTS + 1))
  cells = rng.permutation(4)[:count]
  large = int(rng.integers(count))
  things = []
  for i, cell in enumerate(cells):
    radius = rng.uniform(0.20, 0.235) if i == large else rng.uniform(0.11, 0.14)
    slack = 0.25 - radius
    x, y = (np.array([cell % 2, cell // 2]) + 0.5) / 2 + rng.uniform(-slack, slack, 2)
    color = list(COLORS)[rng.integers(len(COLORS))]
    shape = SHAPES[rng.integers(len(SHAPES))]
    things.append(Thing(SIZES[i == large], color, shape, float(x), float(y), float(radius)))
  relations = tuple(
    _relation(a, b, bool(rng.random() < 0.5)) for a, b in zip(cells[:-1], cells[1:])
  )
  return Scene(tuple(things), relations)


def _relation(cell: int, other: int, prefer_rows: bool) -> str:
  """Where `cell` lies from `other`; diagonal neighbours may be told either way."""
  same_row, same_column = cell // 2 == other // 2, cell % 2 == other % 2
  if same_column or (prefer_rows and not same_row):
    return 'above' if cell // 2 < other // 2 else 'below'
  return 'left of' if cell % 2 < other % 2 else 'right of'


def _render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
  """Paints the scene, edges one pixel soft, as uint8 (size, size, 3)."""
  axis = (np.arange(size, dtype=np.float32) + 0.5) / size
  x_1xW, y_Hx1 = axis[None, :], axis[:, None]
  # A dark backdrop of any hue with a slope of light across it, and grain.
  slope = rng.uniform(-30, 30, 2)
  light = slope[0] * (x_1xW - 0.5) + slope[1] * (y_Hx1 - 0.5)
  image = rng.uniform(20, 110, 3).astype(np.float32) + light[..., None].astype(np.float32)
  for thing in scene.things:
    distance = _signed_distance(thing.shape, x_1xW - thing.x, y_Hx1 - thing.y, thing.radius)
    cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
    paint = np.float32(COLORS[thing.color]) * rng.uniform(0.8, 1.05) + rng.uniform(-12, 12, 3)
    image += cover * (paint.astype(np.float32) - image)
  image += rng.standard_normal(image.shape, np.float32) * 6
  return np.clip(image, 0, 255).astype(np.uint8)


def _signed_distance(shape, dx, dy, radius):
  """About how far outside of the shape (negative: inside), in units of the image side."""
  if shape == 'circle':
    return np.hypot(dx, dy) - radius
  if shape == 'ring':
    return np.abs(np.hypot(dx, dy) - 0.76 * radius) - 0.24 * radius
  if shape == 'square':
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.86 * radius
  if shape == 'triangle':
    return np.maximum(0.894 * np.abs(dx) + 0.447 * -dy - 0.40 * radius, dy - 0.85 * radius)
  bar = 0.3 * radius
  across = np.maximum(np.abs(dx) - radius, np.abs(dy) - bar)
  upright = np.maximum(np.abs(dy) - radius, np.abs(dx) - bar)
  return np.minimum(across, upright)
