"""Per-example clipping: from a batch to the sum of its clipped gradients.

To be read in this order:

| file                | what it tells                                                           |
| ------------------- | ----------------------------------------------------------------------- |
| `clipped_sum.py`    | what is promised and why it holds; what strategies cost                 |
| `vmap.py`           | the strategy `vmap`: the definition of right                            |
| `uses.py`           | where parameters (`views.py`) meet examples (`sites.py`) in a loss      |
| `replay.py`         | the loss again, with a hand on every site                               |
| `outer_products.py` | what a site adds to a gradient; of a batch: `weighted_gradients.py`     |
| `norms.py`          | its norm without the gradient, proven: `gram.py`, `rounding.py`         |
| `kept_sites.py`     | both for all sites; norms of whole gradients: `gradient_norms.py`       |
| `bookkeeping.py`    | the strategy of Bu et al. 2022: all is kept, one backward pass          |
| `ghost.py`          | the strategy of Li et al. 2021: two backward passes; `ghost_site.py`    |

Beside these: `strategy.py` (what a strategy is given and gives back), `clip_functions.py` (from
norms to factors), `contributions.py` (what strategies share), `computed_once.py` (norm and sum see
the same numbers), `tracing.py` (losses that are refused), `jax_internals.py` (what JAX does not
promise), `check.py` (a strategy against vmap), `plain_sum.py` (no clipping) and `summation.py`
(sums of batches).
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

__all__ = [
  'Automatic',
  'CLIPPING_STRATEGIES',
  'CLIP_FUNCTIONS',
  'Clip',
  'ClipFunction',
  'ClippedSum',
  'ClippingFallbackWarning',
  'ClippingMismatch',
  'LARGEST_FACTOR',
  'LossFn',
  'MixedExamplesError',
  'ROUNDING_MARGIN',
  'RunningSum',
  'SMALLEST_CLIP_NORM',
  'check_clipping',
  'choose_strategy',
  'clipped_sum',
  'plain_sum',
  'running_sum',
  'settled',
]
