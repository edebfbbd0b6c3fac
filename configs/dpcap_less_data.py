"""DP-Cap on a part of the data, batch in proportion (Sander et al. 2024)."""

from configs import dpcap
from dpcap import config as config_lib

_PARTS = {
  # argument: (share of the pairs, expected batch size)
  '10percent': (0.1, 131_072),
  '1percent': (0.01, 13_107),
}


def get_config(part='10percent'):
  """`:10percent` or `:1percent`; base size, all else as dpcap.py."""
  share, batch = config_lib.choose('part', part, _PARTS)
  config = dpcap.get_config()
  config.data.dataset_size = int(share * dpcap.LAION_233M)
  config.data.source.path = f'laion233m-{part}'
  config.privacy.expected_batch_size = batch
  return config
