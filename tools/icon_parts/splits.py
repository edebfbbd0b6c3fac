"""Which design sets are trained on, which fit probes, and which test.

Splits are by design set, so that no style of drawing that is tested was trained on. Sets that draw
the same pictures again (another weight, an older release, another colour) go together: what is held
out has its kin in no split.
"""

from typing import Any

SPLITS = ('train', 'probe', 'test')

# Fits linear probes, so that none learns from the labels of what was trained on.
_PROBE = ('iconoir', 'jam', 'lets-icons', 'mynaui', 'noto', 'ph', 'tdesign', 'uil')

_TEST = (
  *('bi', 'carbon', 'flat-color-icons', 'fluent-emoji-flat', 'fa7-solid', 'icon-park', 'mingcute'),
  *('ri', 'tabler'),
)

# In no split. First what is kept for later checks, then kin of what is held out.
_APART = (
  *('boxicons', 'game-icons', 'healthicons', 'hugeicons', 'openmoji', 'solar'),
  *('bx', 'bxl', 'bxs'),  # of boxicons
  *('fa', 'fa-brands', 'fa-regular', 'fa-solid', 'fa6-brands', 'fa6-regular', 'fa6-solid'),
  *('fa7-brands', 'fa7-regular'),
  *('fluent-emoji', 'fluent-emoji-high-contrast'),
  *('icon-park-outline', 'icon-park-solid', 'icon-park-twotone'),
  *('noto-v1', 'uim', 'uis', 'uit'),
)

# SPDX names of licences under which pictures may be changed and passed on.
_FREE = (
  *('Apache-2.0', 'BSD-3-Clause', 'CC-BY-3.0', 'CC-BY-4.0', 'CC-BY-SA-4.0', 'CC0-1.0', 'ISC'),
  *('MIT', 'MPL-2.0', 'OFL-1.1', 'Unlicense'),
)


def license_of(collection: dict[str, Any]) -> str | None:
  """The SPDX name of the licence of a design set, if it says one."""
  return collection.get('license', {}).get('spdx')


def split_of(name: str, collection: dict[str, Any]) -> str | None:
  """The split of a design set; None: it is in none, kept apart or not free."""
  if name in _APART or license_of(collection) not in _FREE:
    return None
  return 'probe' if name in _PROBE else 'test' if name in _TEST else 'train'
