"""Programs that draw textures, in place of the shaders of Shaders21k (Baradad et al., 2022).

A program has one or two layers. A layer moves the coordinates of the plane (waves, swirls, folds),
takes a periodic or noisy pattern of them, perhaps joined with a second one, and colours its values.
Of two layers one lies over the other, or beside it, or shines through. A view says from where and
when the plane is seen: it is what the images of one program differ in.

There is contrast by construction: values are scaled by their own mean and deviation before they
are coloured, and the two colours of a layer are far apart.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpcap.data.texture_fields import MOVES, PATTERNS, TAU, turned, wave

COLORS = {
  'black': (25, 25, 30),
  'white': (235, 235, 230),
  'gray': (130, 130, 130),
  'brown': (115, 75, 45),
  'red': (200, 45, 40),
  'orange': (235, 140, 45),
  'yellow': (235, 215, 80),
  'green': (70, 150, 65),
  'teal': (45, 165, 165),
  'blue': (50, 80, 190),
  'purple': (130, 60, 160),
  'pink': (240, 150, 175),
}
FINISHES = ('smooth', 'sharp', 'terraced', 'lined', 'banded')
JOINS = {'times': np.multiply, 'plus': np.add, 'against': np.maximum}
LAYOUTS = ('over', 'beside', 'through')
RELIEF = 'embossed'
GRAINS = ('coarse', 'medium', 'fine')
_USUAL = ('medium', 'smooth')  # not worth a word

# Of periods of a pattern along a side of the image: each octave is as likely, as in photographs.
_CYCLES = (1.5, 24.0)
_SMALLEST = 100  # pixels a side that fine patterns need
_SHADES = 512  # entries of a colour table
_THERE_AND_BACK = 1 - np.abs(np.linspace(-1, 1, _SHADES, endpoint=False, dtype=np.float32))
_PAIRS = tuple(
  (a, b)
  for a, b in itertools.permutations(COLORS, 2)
  if np.linalg.norm(np.subtract(COLORS[a], COLORS[b])) > 120
)


class Step(NamedTuple):
  """One operation: its name, and numbers in [0, 1) that it makes its parameters of."""

  name: str
  knobs: tuple[float, ...]


class Layer(NamedTuple):
  """A coloured field.

  Attributes:
    moves: what happens to the coordinates, in this order.
    pattern: what values they get.
    cycles: periods of the pattern along a side of the image at zoom 1.
    join: how a second pattern is joined with the first, a key of JOINS; None: there is none.
    second: the second pattern.
    finish: how values become shades, one of FINISHES.
    colors: of low and of high values, keys of COLORS.
    tint: 12 numbers in [0, 1) that move the colours from what their names stand for.
    angle: of the layer's axes, in radians.
  """

  moves: tuple[Step, ...]
  pattern: Step
  cycles: float
  join: str | None
  second: Step | None
  finish: Step
  colors: tuple[str, str]
  tint: tuple[float, ...]
  angle: float

  @property
  def grain(self) -> str:
    """One of GRAINS, by its cycles; each is as likely."""
    low, high = _CYCLES
    return GRAINS[int(3 * math.log(self.cycles / low) / math.log(high / low))]


class Program(NamedTuple):
  """A picture of an unbounded plane.

  Attributes:
    layers: one or two, the upper one first.
    layout: how the upper one lies over the other, one of LAYOUTS.
    relief: light on the slopes of the upper one; None: it is flat.
  """

  layers: tuple[Layer, ...]
  layout: Step
  relief: Step | None


class View(NamedTuple):
  """Where and when a program is looked at.

  Attributes:
    zoom: how many times larger things are seen.
    angle: in radians.
    offset: of the image's centre from that of the plane, in sides of the image.
    time: in [0, 1): things move as it goes on.
    light: how brightness changes along both axes, as a share per side.
  """

  zoom: float
  angle: float
  offset: tuple[float, float]
  time: float
  light: tuple[float, float]


# --- drawing programs and views ---------------------------------------------------------


def draw_program(rng: np.random.Generator) -> Program:
  """A random program."""
  knob = iter(rng.random(128).tolist()).__next__
  layers = tuple(_draw_layer(knob) for _ in range(1 if knob() < 0.4 else 2))
  layout = _draw_step(knob, LAYOUTS)
  return Program(layers, layout, _draw_step(knob, (RELIEF,)) if knob() < 0.4 else None)


def draw_view(rng: np.random.Generator) -> View:
  """A random view of any program."""
  zoom, angle, x, y, time, right, down = rng.random(7).tolist()
  return View(
    zoom=2 ** (zoom - 0.5),
    angle=TAU * angle,
    offset=(0.8 * x - 0.4, 0.8 * y - 0.4),
    time=time,
    light=(right - 0.5, down - 0.5),
  )


def _draw_layer(knob: Callable[[], float]) -> Layer:
  moves, left = [], list(MOVES)
  for _ in range(int(knob() * 2.7)):
    moves.append(_draw_step(knob, left))
    left.remove(moves[-1].name)
  joined = knob() < 0.35
  low, high = _CYCLES
  return Layer(
    moves=tuple(moves),
    pattern=_draw_step(knob, tuple(PATTERNS)),
    cycles=low * (high / low) ** knob(),
    join=_choose(knob, tuple(JOINS)) if joined else None,
    second=_draw_step(knob, tuple(PATTERNS)) if joined else None,
    finish=_draw_step(knob, FINISHES),
    colors=_choose(knob, _PAIRS),
    tint=tuple(knob() for _ in range(12)),
    angle=TAU * knob(),
  )


def _draw_step(knob, names: Sequence[str]) -> Step:
  return Step(_choose(knob, names), tuple(knob() for _ in range(4)))


def _choose(knob, choices: Sequence):
  return choices[int(knob() * len(choices))]


# --- words ------------------------------------------------------------------------------


def caption(program: Program) -> str:
  """What the program does, in words of a small vocabulary; the usual is left out."""
  words = [RELIEF] if program.relief else []
  for i, layer in enumerate(program.layers):
    words += [program.layout.name] * (i > 0)
    words += [word for word in (layer.grain, layer.finish.name) if word not in _USUAL]
    words += [move.name for move in reversed(layer.moves)] + [layer.pattern.name]
    words += [layer.join, layer.second.name] if layer.join else []
    words += ['in', layer.colors[0], 'and', layer.colors[1]]
  return ' '.join(words)


# --- rendering --------------------------------------------------------------------------


def render(program: Program, view: View, size: int) -> np.ndarray:
  """The image uint8 (size, size, 3) of a program in a view; a small one is a larger one shrunk."""
  factor = math.ceil(_SMALLEST / size)
  axis = (np.arange(size * factor, dtype=np.float32) + 0.5) / (size * factor) - 0.5
  upper, *lower = program.layers
  field = _field(upper, view, axis)
  planes = _color(upper, field)
  if lower:
    cover = _cover(program.layout, field, view, axis)
    for plane, below in zip(planes, _color(lower[0], _field(lower[0], view, axis))):
      plane -= below
      plane *= cover
      plane += below
  light = view.light[0] * axis + (1 + view.light[1] * axis)[:, None]
  if program.relief:
    light[1:, 1:] += _relief(program.relief, field)
  for plane in planes:
    plane *= light
    np.minimum(plane, 255, out=plane)
  if factor > 1:
    planes = [_shrunk(plane, factor) for plane in planes]
  return np.stack([plane.astype(np.uint8) for plane in planes], axis=-1)


def _field(layer: Layer, view: View, axis) -> np.ndarray:
  """Values (size, size) of about mean 0 and deviation 1."""
  u, v = _plane(view, axis, layer.angle)
  for name, knobs in layer.moves:
    u, v = MOVES[name](u, v, knobs, view.time)
  name, knobs = layer.pattern
  field = PATTERNS[name](u * layer.cycles, v * layer.cycles, knobs, view.time)
  if layer.join:
    name, knobs = layer.second
    u, v = turned(u, v, TAU * knobs[3], layer.cycles * 2 ** (2 * knobs[2] - 1))
    field = JOINS[layer.join](field, PATTERNS[name](u, v, knobs, view.time))
  some = field[::5, ::3]  # enough to tell
  field -= float(some.mean())
  field *= 1 / max(float(some.std()), 1e-3)
  return field


def _color(layer: Layer, field) -> list[np.ndarray]:
  """Red, green and blue (size, size), float32 in [0, 255]."""
  places = field * (0.11 * _SHADES)
  places += 0.25 * _SHADES
  index = places.astype(np.intp)
  index &= _SHADES - 1
  return [shades.take(index, mode='wrap') for shades in _shades(layer)]


def _shades(layer: Layer) -> np.ndarray:
  """The colour table (3, _SHADES), which goes from low to high and back."""
  t = _THERE_AND_BACK
  name, (a, b, *_) = layer.finish
  if name == 'sharp':
    t = np.clip((t - 0.5) * (4 + 16 * a) + 0.5, 0, 1)
  elif name == 'terraced':
    steps = 3 + int(3 * a)
    t = np.floor(t * (steps - 0.01)) / (steps - 1)
  elif name == 'banded':
    t = 0.5 - 0.5 * np.cos(t * (TAU * (1.5 + int(3 * a))))
  tint = np.array(layer.tint, np.float32).reshape(4, 3, 1)
  named = np.array([COLORS[color] for color in layer.colors], np.float32)[..., None]
  low, high = named + 50 * tint[:2] - 25
  shades = low + (high - low) * t + 30 * b * np.cos(TAU * (t * (1 + tint[2]) + tint[3]))
  if name == 'lined':
    shades[:, np.abs((t * (3 + 3 * a)) % 1 - 0.5) > 0.4] = low * 0.4
  return np.clip(shades, 0, 255)


def _cover(layout: Step, upper, view: View, axis) -> np.ndarray:
  """How much of the upper layer is seen (size, size), in [0, 1]."""
  name, (a, b, c, d) = layout
  if name == 'over':
    cover = upper * (1 + 8 * a) + (0.5 + 2 * b)
  else:
    # Wide wavy bands: beside each other they have an edge, else shares come and go.
    x, y = _plane(view, axis, TAU * a, 0.4 + b)
    cover = wave(x + wave(y * (0.5 + 3 * c) + view.time) * (0.25 - 0.2 * c) + d)
    cover *= 20 if name == 'beside' else 0.3
    cover += 0.5
  return np.clip(cover, 0, 1, out=cover)


def _relief(relief: Step, field) -> np.ndarray:
  """Light on the slopes between pixels of a field, as if it were a height, in [-0.5, 0.5]."""
  slope = field[1:, 1:] - field[:-1, :-1]
  slope *= (0.1 + 0.15 * relief.knobs[0]) / max(float(slope[::5, ::3].std()), 1e-3)
  return np.clip(slope, -0.5, 0.5, out=slope)


def _shrunk(plane, factor: int) -> np.ndarray:
  """The mean of each square of `factor` pixels a side; NumPy's is slow along short axes."""
  rows = sum(plane[i::factor] for i in range(factor))
  return sum(rows[:, i::factor] for i in range(factor)) / factor**2


def _plane(view: View, axis, angle: float, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
  """Where the pixels lie on the plane, along axes turned by `angle`: (size, size) each."""
  x_1xW, y_Hx1 = axis[None, :] + view.offset[0], axis[:, None] + view.offset[1]
  return turned(x_1xW, y_Hx1, view.angle + angle, scale / view.zoom)
