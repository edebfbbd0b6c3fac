"""What a private run learns, as a law of its size, steps and noise-to-batch ratio.

McKenna et al. 2025 (arXiv 2501.18914) find that the loss of a DP-SGD run follows from model size M,
steps T and the noise-to-batch ratio r = sigma / B alone. The law here is

    loss(M, T, r) = E_M + A_M T^-b_M + C_M (r / r_0)^g,        with all parameters >= 0

what a size never learns, what it has not learnt yet, and what noise keeps it from learning: at a
constant learning rate noise holds parameters at a distance from the optimum, however long a run is.
r_0 is the geometric middle of the measured ratios, so that C is a loss. E, A, b and C are a size's
own, g is common to all: 1 + 4 (sizes) parameters. The loss falls with T and grows with r whatever
they are. Errors are relative: of the logarithm of the loss.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from dpcap.errors import UserError

# Ratios that a size must have: the power of the noise is not told by fewer.
FEWEST_RATIOS = 3

# (smallest, largest) of the powers of steps and noise.
_DECAYS, _POWERS = (0.02, 3.0), (0.1, 3.0)


@dataclasses.dataclass(frozen=True)
class Reading:
  """The loss of a run over a stretch of its steps.

  Attributes:
    size: of the model, by name.
    ratio: sigma / B.
    step: the middle of the stretch, geometric.
    loss: the mean over it.
  """

  size: str
  ratio: float
  step: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Law:
  """The law with its parameters; see above.

  Attributes:
    floor: size -> E.
    scale: size -> A.
    decay: size -> b.
    noise: size -> C.
    noise_power: g.
    steps, ratios: (smallest, largest) that it was fitted to.
  """

  floor: dict[str, float]
  scale: dict[str, float]
  decay: dict[str, float]
  noise: dict[str, float]
  noise_power: float
  steps: tuple[float, float]
  ratios: tuple[float, float]

  def loss(self, size: str, steps: float, ratio: float) -> float:
    """The loss that a run is predicted to have after `steps`."""
    learnt = self.scale[size] * steps ** -self.decay[size]
    noise = self.noise[size] * (ratio / math.sqrt(math.prod(self.ratios))) ** self.noise_power
    return self.floor[size] + learnt + noise

  def outside(self, steps: float, ratio: float) -> float:
    """By what factor steps or ratio are outside of the measured range; 1: they are within."""
    return max(
      max(low / value, value / high, 1.0)
      for value, (low, high) in ((steps, self.steps), (ratio, self.ratios))
    )


@dataclasses.dataclass(frozen=True)
class Errors:
  """Relative errors of a law, root mean square and largest.

  Attributes:
    fit, fit_largest: of the readings that it was fitted to.
    left_out, left_out_largest: of the readings of each run by the law of all other runs.
  """

  fit: float
  fit_largest: float
  left_out: float
  left_out_largest: float


def fit(readings: Sequence[Reading]) -> tuple[Law, Errors]:
  """The law nearest to the readings by the sum of squared relative errors, and how near it is.

  Raises:
    UserError: if they are too few to tell the parameters.
  """
  ratios: dict[str, set[float]] = {}
  for reading in readings:
    ratios.setdefault(reading.size, set()).add(reading.ratio)
  for size, own in ratios.items():
    if len(own) < FEWEST_RATIOS:
      raise UserError(
        f'size {size} has runs at {len(own)} noise-to-batch ratios; a law takes {FEWEST_RATIOS}'
        ' or more: add some to --ratios'
      )
  if len(readings) <= 1 + 4 * len(ratios):
    raise UserError(
      f'{len(readings)} readings do not determine the {1 + 4 * len(ratios)} parameters of the law;'
      ' raise --steps'
    )
  law = _nearest(readings)
  left_out = []
  for run in sorted({(reading.size, reading.ratio) for reading in readings}):
    own = [reading for reading in readings if (reading.size, reading.ratio) == run]
    others = _nearest([reading for reading in readings if reading not in own])
    left_out.append(_relative(others, own))
  own, left_out = _relative(law, readings), np.concatenate(left_out)
  return law, Errors(*map(float, (_rms(own), abs(own).max(), _rms(left_out), abs(left_out).max())))


def _nearest(readings):
  names = list(dict.fromkeys(reading.size for reading in readings))
  size = np.array([names.index(reading.size) for reading in readings])
  ratio, step, loss = (
    np.array([getattr(reading, name) for reading in readings]) for name in ('ratio', 'step', 'loss')
  )
  steps, ratios = ((float(x.min()), float(x.max())) for x in (step, ratio))
  middle = math.sqrt(math.prod(ratios))

  def error(x):
    floor, scale, decay, noise = np.exp(x[1:].reshape(4, -1))[:, size]
    predicted = floor + scale * step**-decay + noise * (ratio / middle) ** np.exp(x[0])
    return np.log(predicted / loss)

  most = loss.max()
  bounds = [(most / 1e6, most), (most / 1e6, most * 1e9), _DECAYS, (most / 1e6, most)]
  low, high = np.log([_POWERS, *itertools.chain(*([pair] * len(names) for pair in bounds))]).T
  best = None
  # The sum has valleys: each start finds one.
  for floor, decay, noise in itertools.product((0.05, 0.5), (0.3, 1.0), (0.01, 0.2)):
    scale = most * steps[0] ** decay
    start = [0.7, *np.repeat([floor * loss.min(), scale, decay, noise * most], len(names))]
    found = optimize.least_squares(error, np.clip(np.log(start), low, high), bounds=(low, high))
    if best is None or found.cost < best.cost:
      best = found
  parts = np.exp(best.x[1:].reshape(4, -1))
  floor, scale, decay, noise = (dict(zip(names, map(float, part))) for part in parts)
  return Law(
    floor=floor,
    scale=scale,
    decay=decay,
    noise=noise,
    noise_power=float(np.exp(best.x[0])),
    steps=steps,
    ratios=ratios,
  )


def _relative(law, readings):
  """log(predicted / measured) of each."""
  return np.array([math.log(law.loss(r.size, r.step, r.ratio) / r.loss) for r in readings])


def _rms(errors):
  return math.sqrt(np.mean(np.square(errors)))
