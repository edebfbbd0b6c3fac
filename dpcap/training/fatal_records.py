"""Records that end or hang the process that reads them, as a run remembers them.

They are found while batches are loaded (`dpcap.data.guarded`): such a record contributes zero from
the step on for which it was found, and so it does when that step is done again. Steps before it, in
which its contribution counted or it was not drawn, stay as they are: what is replayed from an older
checkpoint comes out in the same bits and counts once. The ledger does not rely on that. A step in
which a record that was fine before now ends its process comes out in other bits; its digest says so
(`dpcap.privacy.keys`), nothing of it is kept, and what was released counts.

A process of many finds those of its own rows, and writes a file of its own beside the keys. All
processes start with what all files say, as the main one read it. What one of them finds later the
others do not know until the next start; where such a record comes to their rows, they find it
themselves. That costs time and changes no sum: it contributes zero there as well. (Of a group of
near duplicates it is one sample that is fatal, not the group, or that would not be so.)

Which records are fatal follows from private data, so the files are as private as the keys.
"""

import contextlib
import json
import pathlib

from dpcap.training.workdir import write_whole


class FatalRecords:
  """What one process of a run has found of one source; see the module docstring."""

  def __init__(self, directory: pathlib.Path, process: int, source: str):
    """The file of process `process` in `directory`, of the source with that fingerprint."""
    self._directory, self._source = directory, source
    self._path = directory / f'fatal_records.{process}.private.jsonl'

  def read(self) -> list[tuple[int, int]]:
    """Every (record, the first step that leaves it out) that any process found in this source.

    Lines that cannot be read are left out: their records are found again.
    """
    first = {}
    for path in sorted(self._directory.glob('fatal_records.*.private.jsonl')):
      for line in path.read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
          about = json.loads(line)
          record, step = int(about['record']), int(about['step'])
          if about['source'] == self._source:
            first[record] = min(step, first.get(record, step))
    return sorted(first.items())

  def add(self, record: int, step: int) -> None:
    """Writes down that `record` contributes zero from `step` (0, 1, ...) on."""
    line = json.dumps({'record': record, 'step': step, 'source': self._source}) + '\n'
    before = self._path.read_text(errors='replace') if self._path.exists() else ''
    write_whole(self._path, before + line)
