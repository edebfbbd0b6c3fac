"""Which pictures are near duplicates: candidates by a 64-bit hash, then thumbnail by thumbnail.

The hash is a SimHash (Charikar 2002): signs of 64 fixed random projections of the low frequencies
of a thumbnail, so that pictures that look alike differ in few bits. Brightness, contrast and
colours do not count. (The usual perceptual hash takes the signs of the frequencies themselves. A
picture that is its own mirror image has frequencies that are zero, whose signs are noise: of icons
saved anew as JPEG it finds three in four.)

Pairs within a few bits are found without comparing all (Manku et al. 2007): the bits are cut into
blocks, and two hashes that differ in d bits agree in all blocks but d, so they meet in a table that
is sorted by some choice of those. That finds every such pair.

The hash knows what a picture looks like from afar. Two are near duplicates if their thumbnails say
so too: buttons with another letter on them differ in one place.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import scipy.fft
import scipy.sparse.csgraph

from tools.dedup_parts.pictures import SIDE, Pictures

BITS = 64
MOST_BITS = 8  # that two hashes may differ in; more would take thousands of tables
# In units of a picture's contrast, the deviation of its thumbnail: the root mean square over the
# thumbnail, and its worst place. Of copies of icons at half their size or of JPEG quality 30, 99.7%
# stay below 0.1 and 0.5; icons that differ in a letter or digit are mostly above 0.6 there.
_MEAN_DIFFERENCE = 0.1
_WORST_DIFFERENCE = 0.5
# Levels of 255: what has less contrast shows nothing that could be known again.
_LEAST_CONTRAST = 2.0
_LOW = 8  # frequencies in each direction
_AT_ONCE = 2**16


def find_groups(pictures: Pictures, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """The first of the group that each picture is in: of exact copies, and with near ones.

  A group is what hangs together by near pairs: two in it need not be near each other. Pictures that
  cannot be decoded are alone.

  Args:
    pictures: n of them.
    bits: that hashes of near duplicates differ in at most, up to MOST_BITS.

  Returns:
    int64 (n,) twice: a picture's own number where it is the first.
  """
  _, firsts, inverse = np.unique(pictures.digests, return_index=True, return_inverse=True)
  exact = firsts[inverse]
  bad = pictures.digests == 0
  exact[bad] = np.flatnonzero(bad)
  shows = _contrasts(pictures.thumbnails) >= _LEAST_CONTRAST
  distinct = np.flatnonzero((exact == np.arange(len(exact))) & shows & ~bad)
  edges = [(np.arange(len(exact)), exact), *near_pairs(pictures.thumbnails, distinct, bits)]
  a, b = (np.concatenate(ends) for ends in zip(*edges))
  graph = scipy.sparse.coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(exact),) * 2)
  labels = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
  _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
  return exact, firsts[inverse]


def near_pairs(
  thumbnails: np.ndarray, numbers: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """All near pairs (a, b) among some of the thumbnails, some at a time, each pair once.

  Args:
    thumbnails: uint8 (n, SIDE, SIDE).
    numbers: int64 (m,), which of them.
    bits: see `find_groups`.
  """
  for pairs in close_pairs(hashes(thumbnails)[numbers], bits):
    for start in range(0, len(pairs[0]), _AT_ONCE):
      a, b = (numbers[ends[start : start + _AT_ONCE]] for ends in pairs)
      near = alike(thumbnails[a], thumbnails[b])
      yield a[near], b[near]


def hashes(thumbnails: np.ndarray) -> np.ndarray:
  """The 64-bit hashes (n,) of uint8 thumbnails (n, SIDE, SIDE)."""
  # Fixed, or hashes of one day could not be compared with those of another.
  projections = np.random.default_rng(0).standard_normal((_LOW * _LOW, BITS))
  weights = np.hypot(*np.mgrid[:_LOW, :_LOW])  # of pictures, low frequencies are the strongest
  found = np.zeros(len(thumbnails), np.uint64)
  for start in range(0, len(found), _AT_ONCE):
    part = thumbnails[start : start + _AT_ONCE].astype(np.float64)
    frequencies = scipy.fft.dctn(part, axes=(1, 2), norm='ortho')[:, :_LOW, :_LOW] * weights
    signs = frequencies.reshape(-1, _LOW * _LOW) @ projections > 0
    found[start : start + _AT_ONCE] = np.packbits(signs, axis=1).view(np.uint64)[:, 0]
  return found


def close_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """All pairs (a, b) of hashes (n,) that differ in up to `bits` bits, some at a time, each once."""
  blocks = _blocks(len(hashes), bits)
  for kept in itertools.combinations(range(len(blocks)), len(blocks) - bits):
    keys = hashes & np.bitwise_or.reduce(blocks[list(kept)])
    order = np.argsort(keys, kind='stable')
    keys = keys[order]
    # Places in the table that have the key of the one `step` further down.
    places = np.arange(len(keys))
    for step in itertools.count(1):
      places = places[places < len(keys) - step]
      places = places[keys[places] == keys[places + step]]
      if not len(places):
        break
      a, b = order[places], order[places + step]
      differing = hashes[a] ^ hashes[b]
      close = np.bitwise_count(differing) <= bits
      # A pair that agrees in more blocks than these meets in several tables; the first counts.
      for block in set(range(kept[-1])).difference(kept):
        close &= (differing & blocks[block]) != 0
      if close.any():
        yield a[close], b[close]


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Whether the pairs of thumbnails, uint8 (n, SIDE, SIDE) each, show the same: bool (n,)."""
  difference = np.abs(_without_contrast(a) - _without_contrast(b)).reshape(-1, SIDE * SIDE)
  mean = np.sqrt(np.square(difference).mean(axis=1))
  return (mean <= _MEAN_DIFFERENCE) & (difference.max(axis=1, initial=0) <= _WORST_DIFFERENCE)


def _blocks(count: int, bits: int) -> np.ndarray:
  """Masks (m,) that cut the bits into so many blocks that m - bits of them tell `count` hashes."""
  wanted = min(math.log2(count + 1), BITS / 2)
  m = next(m for m in range(bits + 1, BITS) if BITS * (m - bits) / m >= wanted)
  ends = [i * BITS // m for i in range(m + 1)]
  return np.array([2**end - 2**start for start, end in itertools.pairwise(ends)], np.uint64)


def _without_contrast(thumbnails: np.ndarray) -> np.ndarray:
  values = thumbnails.astype(np.float32)
  values -= values.mean(axis=(1, 2), keepdims=True)
  return values / np.maximum(values.std(axis=(1, 2), keepdims=True), _LEAST_CONTRAST)


def _contrasts(thumbnails: np.ndarray) -> np.ndarray:
  parts = range(0, len(thumbnails), _AT_ONCE)
  of = [thumbnails[i : i + _AT_ONCE].std(axis=(1, 2), dtype=np.float32) for i in parts]
  return np.concatenate([np.zeros(0, np.float32), *of])
