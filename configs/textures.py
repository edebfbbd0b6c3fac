"""The first stage of ViP and DP-Cap: a masked autoencoder on generated textures, no data at all.

    python -m dpcap.train --config=configs/textures.py:base --workdir=runs/textures
    python -m dpcap.train --config=configs/dpcap.py:base,synthetic --workdir=runs/dpcap

The word `synthetic` of dpcap.py and vip.py starts from that workdir. The textures stand for Shaders21k
(Baradad et al. 2022), which the papers' stage is trained on; its length is ours.
"""

from configs import mae
from dpcap import config as config_lib
from dpcap import data


def get_config(argument=''):
  """A word of SIZES, as mae.py."""
  config = mae.get_config(argument)
  config.data.source = config_lib.source_config('textures', size=1_000_000)
  config.data.dataset_size = None
  config.data.vocabulary = data.TEXTURES_VOCABULARY
  config.train.steps = 20_000
  return config
