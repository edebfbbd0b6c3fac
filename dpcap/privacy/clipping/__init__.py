"""Per-example gradient clipping: from a batch to the sum of its clipped gradients.

Read `clipped_sum.py` first: what is promised, and by which strategies it is computed.
"""

from dpcap.privacy.clipping.check import ClippingMismatch, check_clipping
from dpcap.privacy.clipping.clip_functions import CLIP_FUNCTIONS, Automatic, Clip, ClipFunction
from dpcap.privacy.clipping.clipped_sum import (
  CLIPPING_STRATEGIES,
  LARGEST_FACTOR,
  ROUNDING_MARGIN,
  SMALLEST_CLIP_NORM,
  choose_strategy,
  clipped_sum,
)
from dpcap.privacy.clipping.computed_once import settled
from dpcap.privacy.clipping.plain_sum import plain_sum
from dpcap.privacy.clipping.strategy import ClippedSum, LossFn
from dpcap.privacy.clipping.summation import RunningSum, running_sum
from dpcap.privacy.clipping.tracing import MixedExamplesError
from dpcap.privacy.clipping.uses import ClippingFallbackWarning
