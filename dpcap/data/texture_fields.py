"""What texture programs are made of: moves and patterns, functions of coordinates.

All take coordinates `u` and `v`, float32 (H, W), four knobs in [0, 1), which their parameters are
made of, and the time in [0, 1), with which what they give may move. Knobs and time are Python's
floats, so that all stays float32.

A move gives other coordinates, in sides of the image as those it gets. A pattern gets coordinates
in periods and gives values (H, W), of which it matters only how they lie to each other.
"""

import functools
import itertools
import math

import numpy as np

TAU = 2 * math.pi


def turned(u, v, angle, scale):
  """Coordinates along axes that are turned by `angle`, times `scale`."""
  cos, sin = scale * math.cos(angle), scale * math.sin(angle)
  return cos * u - sin * v, sin * u + cos * v


def wave(turns):
  """A sine of period 1; `turns` is overwritten."""
  turns *= TAU
  return np.sin(turns, out=turns)


# --- moves ------------------------------------------------------------------------------


def _wavy(u, v, knobs, time):
  a, b, c, d = knobs
  depth = 0.03 + 0.09 * a
  phase = TAU * (d + time)
  return (
    u + depth * np.sin(v * (TAU * (0.7 + 2.5 * b)) + phase),
    v + depth * np.sin(u * (TAU * (0.7 + 2.5 * c)) - phase),
  )


def _warped(u, v, knobs, time):
  a, b, c, d = knobs
  depth = 0.05 + 0.12 * a
  right = _look_up('smooth', u * (0.4 + b), v * (0.4 + b), c + time, d)
  down = _look_up('smooth', v * (0.4 + b), u * (0.4 + b), d, c - time)
  return u + depth * right, v + depth * down


def _swirled(u, v, knobs, time):
  a, b, *_ = knobs
  squared = u * u + v * v
  turn = np.exp(squared * -(3 + 6 * b)) * ((2 + 5 * a) * (1 if b < 0.5 else -1))
  sin, cos = np.sin(turn), np.cos(turn)
  return cos * u - sin * v, sin * u + cos * v


def _radial(u, v, knobs, time):
  a, b, *_ = knobs
  radius = np.sqrt(u * u + v * v)
  if a < 0.5:
    radius = np.log(radius + 0.03) * 0.35
  # Mirrored about an axis: no seam.
  return radius + 0.2 * time, np.abs(np.arctan2(v, u)) * ((1 + int(4 * b)) / TAU)


def _kaleidoscopic(u, v, knobs, time):
  a, b, c, _ = knobs
  sectors = 3 + int(6 * a)
  turn = np.arctan2(v, u) * (sectors / TAU)
  turn = np.abs(turn - np.floor(turn + 0.5)) * (TAU / sectors)
  radius = np.sqrt(u * u + v * v)
  return radius * np.cos(turn) + (b + 0.3 * time), radius * np.sin(turn) + c


def _mirrored(u, v, knobs, time):
  a, b, c, _ = knobs
  width, height = 0.25 + 0.4 * a, 0.25 + 0.4 * b
  return (
    np.abs(u - width * np.floor(u / width + 0.5)) + c,
    np.abs(v - height * np.floor(v / height + 0.5)) + 0.3 * time,
  )


def _inverted(u, v, knobs, time):
  a, b, *_ = knobs
  scale = (0.08 + 0.1 * a) / (u * u + v * v + (0.02 + 0.05 * b))
  return u * scale + 0.3 * time, v * scale


def _pixelated(u, v, knobs, time):
  cells = 14 + 30 * knobs[0]
  return np.floor(u * cells) * (1 / cells), np.floor(v * cells) * (1 / cells)


def _bulging(u, v, knobs, time):
  a, b, *_ = knobs
  scale = np.sqrt(u * u + v * v + (0.01 + 0.05 * b)) * (2 + 2 * a)
  return u * scale, v * scale


def _shattered(u, v, knobs, time):
  a, b, c, _ = knobs
  scale = 0.3 + 0.5 * a
  turn = _look_up('tones', u * scale, v * scale, b, c)
  turn *= TAU
  sin, cos = np.sin(turn), np.cos(turn)
  return cos * u - sin * v, sin * u + cos * v + turn


# What a pattern is called on moved coordinates -> the move.
MOVES = {
  'wavy': _wavy,
  'warped': _warped,
  'swirled': _swirled,
  'radial': _radial,
  'kaleidoscopic': _kaleidoscopic,
  'mirrored': _mirrored,
  'inverted': _inverted,
  'pixelated': _pixelated,
  'bulging': _bulging,
  'shattered': _shattered,
}


# --- patterns ---------------------------------------------------------------------------


def _triangle(turns):
  """A triangle of period 1, 1 at whole numbers; `turns` is overwritten."""
  turns -= np.floor(turns)
  turns -= 0.5
  np.abs(turns, out=turns)
  turns *= 4
  turns -= 1
  return turns


def _staggered(u, v):
  """Places in cells of side 1, from their centres, and rows, every other shifted by half a cell."""
  row = np.floor(v)
  u = u + row * 0.5
  u -= np.floor(u)
  return u - 0.5, v - row - 0.5, row


def _stripes(u, v, knobs, time):
  return wave(u + time)


def _checks(u, v, knobs, time):
  return wave(u + time) * wave(v * (0.6 + 0.8 * knobs[0]))


def _plaid(u, v, knobs, time):
  a, b, *_ = knobs
  return wave(u + time) + wave(v * (0.6 + 0.8 * a)) + wave((u if b < 0.5 else v) * 4) * 0.5


def _dots(u, v, knobs, time):
  u, v, _ = _staggered(u + time, v * 1.155)
  u *= u
  v *= v
  return 0.5 - 5 * (u + v)


def _rings(u, v, knobs, time):
  return wave(np.sqrt(u * u + v * v) - time)


def _ripples(u, v, knobs, time):
  a, b, *_ = knobs
  x, y = u - 3 * a, v - 3 * b
  return wave(np.sqrt(u * u + v * v) - time) + wave(np.sqrt(x * x + y * y) + time)


def _spirals(u, v, knobs, time):
  arms = 1 + int(5 * knobs[0])
  return wave(np.sqrt(u * u + v * v) + np.arctan2(v, u) * (arms / TAU) - time)


def _petals(u, v, knobs, time):
  a, b, *_ = knobs
  petals = np.cos(np.arctan2(v, u) * (3 + int(6 * a)) + TAU * time)
  return wave(np.sqrt(u * u + v * v) * (1 + (0.1 + 0.25 * b) * petals) - time)


def _triangles(u, v, knobs, time):
  half, rise = u * 0.5, v * 0.866
  return np.maximum(np.maximum(_triangle(u + time), _triangle(half + rise)), _triangle(half - rise))


def _honeycomb(u, v, knobs, time):
  half, rise = u * 0.5, v * 0.866
  return (wave(u + 0.25) + wave(rise - half + 0.25) + wave(half + rise + 0.25)) * 0.6


def _bricks(u, v, knobs, time):
  wide = u * 0.4
  x, y, row = _staggered(wide, v)
  tone = np.sin((wide - x) * 39.3 + row * 27.1)  # of each brick
  joint = np.minimum(0.5 - np.abs(x), (0.5 - np.abs(y)) * 0.4) < 0.03 + 0.03 * knobs[0]
  tone *= 0.5
  tone += y * 0.3
  return np.where(joint, -1.5, tone)


def _weave(u, v, knobs, time):
  half = (np.floor(u) + np.floor(v)) * 0.5
  over = (half - np.floor(half)) * 2
  across, along = _triangle(u + 0.5), _triangle(v + 0.5)
  across -= along
  across *= over
  across += along
  return across


def _scales(u, v, knobs, time):
  x, y, _ = _staggered(u + time, v * 2)
  y += 0.5
  x *= x
  y *= y
  y *= 0.5
  return _triangle(np.sqrt(x + y))


def _clouds(u, v, knobs, time):
  a, b, c, _ = knobs
  name = ('smooth', 'rough', 'rougher')[int(3 * a)]
  return _look_up(name, u * 0.25, v * 0.25, b + time, c)


def _marble(u, v, knobs, time):
  a, b, c, _ = knobs
  noise = _look_up('rough', u * 0.2, v * 0.2, b, c)
  noise *= 0.3 + 0.5 * a
  noise += u + time
  return wave(noise)


def _fibers(u, v, knobs, time):
  a, b, *_ = knobs
  stretch = 0.02 + 0.04 * a
  return _look_up('rough', u * 0.3, v * stretch, b + time, 0)


def _cell_pattern(u, v, knobs, time, *, table):
  a, b, *_ = knobs
  return _look_up(table, u * (1 / _POINTS), v * (1 / _POINTS), a + time, b)


PATTERNS = {
  'stripes': _stripes,
  'checks': _checks,
  'plaid': _plaid,
  'dots': _dots,
  'rings': _rings,
  'ripples': _ripples,
  'spirals': _spirals,
  'petals': _petals,
  'triangles': _triangles,
  'honeycomb': _honeycomb,
  'bricks': _bricks,
  'weave': _weave,
  'scales': _scales,
  'clouds': _clouds,
  'marble': _marble,
  'fibers': _fibers,
  'cells': functools.partial(_cell_pattern, table='cells'),
  'cracks': functools.partial(_cell_pattern, table='cracks'),
  'patches': functools.partial(_cell_pattern, table='patches'),
}


# --- tables -----------------------------------------------------------------------------

_SIDE = 1024  # of the tables, a power of two
_POINTS = 6  # cells along a side


def _look_up(name, u, v, u_start, v_start):
  """Values (H, W) of a table that tiles the plane, at coordinates in its sides from a start in it.

  They are of the level that has two to four texels a pixel: from afar they look smooth, and what is
  read fits the processor's cache.
  """
  levels = _tables()[name]
  step = sum(float(np.abs(np.diff(along[::16], axis=1)).mean()) for along in (u, v))
  level = levels[min(int(math.log2(max(step * _SIDE / 2, 1))), len(levels) - 1)]
  side = len(level)
  index, column = v * side, u * side
  index += (v_start + 64) * side  # above 0, where the cast rounds down
  column += (u_start + 64) * side
  index, column = index.astype(np.int32), column.astype(np.int32)
  index &= side - 1
  column &= side - 1
  index *= side
  index += column
  return level.take(index.astype(np.intp), mode='wrap')  # 'raise' would look at all of them first


@functools.cache
def _tables() -> dict[str, list[np.ndarray]]:
  """Name -> levels (S, S), float32: S is _SIDE, and half as much from level to level."""
  rng = np.random.Generator(np.random.Philox(key=0x7AB1E5))
  slopes = {'smooth': 3, 'rough': 2, 'rougher': 1.4}
  tables = {name: _make_noise(slope, rng) for name, slope in slopes.items()} | _make_cells(rng)
  return {name: list(_levels(table.astype(np.float32))) for name, table in tables.items()}


def _levels(table):
  while len(table) >= 32:
    yield table
    table = table.reshape(len(table) // 2, 2, len(table) // 2, 2).mean((1, 3))


def _make_noise(slope: float, rng) -> np.ndarray:
  """Noise (_SIDE, _SIDE) whose amplitudes fall with the frequency to the power of `slope`."""
  down, right = np.fft.fftfreq(_SIDE) * _SIDE, np.fft.rfftfreq(_SIDE) * _SIDE
  # Flat below 2 waves a side: of the longest there are too few to differ from place to place.
  frequency = np.sqrt(down[:, None] ** 2 + right**2 + 4)
  waves = np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE))) / frequency**slope
  noise = np.fft.irfft2(waves, (_SIDE, _SIDE))
  return (noise - noise.mean()) / noise.std()


def _make_cells(rng) -> dict[str, np.ndarray]:
  """What lies around scattered points, (_SIDE, _SIDE) each.

  'cells' are high near a point, 'cracks' where the two nearest are as near; 'tones' are a random
  number of the nearest, and 'patches' are tones that are not quite even.
  """
  points, tones = rng.random((2, _POINTS, _POINTS)), rng.random((_POINTS, _POINTS))
  place = (np.arange(_SIDE) + 0.5) * (_POINTS / _SIDE)
  cell = np.floor(place).astype(int)
  nearest = second = np.full((_SIDE, _SIDE), np.inf, np.float32)
  tone = np.zeros_like(nearest)
  for down, right in itertools.product((-1, 0, 1), repeat=2):
    at = np.ix_((cell + down) % _POINTS, (cell + right) % _POINTS)
    y = (cell + down - place)[:, None] + points[0][at]
    x = cell + right - place + points[1][at]
    distance = np.hypot(x.astype(np.float32), y.astype(np.float32))
    tone = np.where(distance < nearest, tones[at], tone)
    second = np.minimum(second, np.maximum(distance, nearest))
    nearest = np.minimum(distance, nearest)
  return {
    'cells': 1 - 2 * nearest,
    'cracks': 1 - 2 * np.sqrt(second - nearest),
    'tones': tone,
    'patches': tone - 0.2 * nearest,
  }
