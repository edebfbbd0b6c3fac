"""What a private run learns, as a law of its size, steps and noise-to-batch ratio.

McKenna et al. 2025 (arXiv 2501.18914) find that the loss of a DP-SGD run follows from model size M,
steps T and the noise-to-batch ratio r = sigma / B alone. The law here is

    loss(M, T, r) = E + A_M (T / (1 + (r / R_M)^c))^-b,        E >= 0 and A_M, R_M, b, c > 0:

a power law in the steps that a run is worth, which noise makes fewer: at r = R_M it takes twice as
many steps as without noise. That is how steps depend on the noise of a gradient in McCandlish et al.
2018 (arXiv 1812.06162, eq. 2.11), but that c and R are fitted. The loss falls with T and grows with r
whatever the parameters; E, b and c are common to all sizes, A and R are a size's own, so there are
3 + 2 (sizes) of them. Errors are relative: of the logarithm of the loss.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from dpcap.errors import UserError

# Ratios that a size must have: knee and power are not told apart by fewer.
FEWEST_RATIOS = 3

# (smallest, largest) of the powers of steps and noise.
_DECAYS, _POWERS = (0.02, 3.0), (0.2, 4.0)


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
    floor: E.
    decay: b.
    noise_power: c.
    scale: size -> A.
    knee: size -> R.
    steps, ratios: (smallest, largest) that it was fitted to.
  """

  floor: float
  decay: float
  noise_power: float
  scale: dict[str, float]
  knee: dict[str, float]
  steps: tuple[float, float]
  ratios: tuple[float, float]

  def loss(self, size: str, steps: float, ratio: float) -> float:
    """The loss that a run is predicted to have after `steps`."""
    worth = steps / (1 + (ratio / self.knee[size]) ** self.noise_power)
    return self.floor + self.scale[size] * worth**-self.decay

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
  if len(readings) <= 3 + 2 * len(ratios):
    raise UserError(
      f'{len(readings)} readings do not determine the {3 + 2 * len(ratios)} parameters of the law;'
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

  def error(x):
    floor, decay, power = np.exp(x[:3])
    scale, knee = np.exp(x[3:].reshape(2, -1))[:, size]
    worth = step / (1 + (ratio / knee) ** power)
    return np.log((floor + scale * worth**-decay) / loss)

  lowest, span = loss.min(), (ratio.min(), ratio.max())
  bounds = [(lowest / 1e3, lowest), _DECAYS, _POWERS]
  bounds += [(lowest / 1e6, loss.max() * 1e9)] * len(names)
  bounds += [(span[0] / 30, span[1] * 30)] * len(names)
  low, high = np.log(bounds).T
  best = None
  # The sum has valleys: each start finds one.
  for floor, decay, knee in itertools.product((0.1, 0.9), (0.2, 0.8), (0, 1)):
    start = [floor * lowest, decay, 1.5]
    start += [np.median(loss) * np.median(step) ** decay] * len(names)
    start += [span[knee]] * len(names)
    found = optimize.least_squares(error, np.clip(np.log(start), low, high), bounds=(low, high))
    if best is None or found.cost < best.cost:
      best = found
  floor, decay, power = map(float, np.exp(best.x[:3]))
  scale, knee = np.exp(best.x[3:].reshape(2, -1))
  return Law(
    floor=floor,
    decay=decay,
    noise_power=power,
    scale=dict(zip(names, map(float, scale))),
    knee=dict(zip(names, map(float, knee))),
    steps=(float(step.min()), float(step.max())),
    ratios=(float(span[0]), float(span[1])),
  )


def _relative(law, readings):
  """log(predicted / measured) of each."""
  return np.array([math.log(law.loss(r.size, r.step, r.ratio) / r.loss) for r in readings])


def _rms(errors):
  return math.sqrt(np.mean(np.square(errors)))
