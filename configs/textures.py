"""The first stage of ViP and DP-Cap: a masked autoencoder on generated textures, no data at all.

    python -m dpcap.train --config=configs/textures.py:base --workdir=runs/textures
    python -m dpcap.train --config=configs/dpcap.py:base,synthetic --workdir=runs/dpcap

For ViP, whose encoder differs by some biases, the first is configs/textures.py:base,for_vip.

The word `synthetic` of dpcap.py and vip.py starts from that workdir. The textures stand for
Shaders21k (Baradad et al. 2022), which the papers' stage is trained on; its length is ours.
"""

from configs import mae
from configs.dpcap import SIZES
from dpcap import config as config_lib

ENCODERS = {'for_dpcap': 'captioner', 'for_vip': 'vip'}


def get_config(argument=''):
  """Words of SIZES and ENCODERS, parted by commas."""
  size, encoder = config_lib.read_words(argument, SIZES, ENCODERS)
  config = mae.get_config(size)
  config.model.encoder_of = ENCODERS[encoder]
  config.data.source = config_lib.source_config('textures', size=1_000_000, programs=21_000)
  config.data.dataset_size = None
  config.train.steps = 20_000
  return config
