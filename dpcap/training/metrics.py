"""What a run writes about itself, public and private apart.

`metrics.jsonl` holds what follows from the config and the clock. Everything derived from
private data (loss, norms, counts) is outside the guarantee: it goes to files whose name
says so, `diagnostics.private.jsonl` and TensorBoard events ending in `.private`, and is
switched off by `train.diagnostics=False`.
"""

import contextlib
import json
import math
import pathlib
from typing import Any

from tensorboardX import SummaryWriter

from dpcap.training.workdir import is_private, open_to_append, owner_only, write_whole

METRICS = 'metrics.jsonl'
DIAGNOSTICS = 'diagnostics.private.jsonl'


class MetricWriter:
  """Appends numbers to a JSON-lines file and to TensorBoard events.

  Where the file's name says private, so does that of the events, and both are readable by the
  owner only.
  """

  def __init__(self, workdir: pathlib.Path, name: str, resume_step: int):
    """Opens `workdir / name`, dropping lines past `resume_step`: they are replayed."""
    path, events = workdir / name, workdir / 'tensorboard'
    if path.exists():
      kept = [line for line in read_jsonl(path) if line['step'] <= resume_step]
      write_whole(path, ''.join(map(_to_json, kept)))
    self._file = open_to_append(path)
    events.mkdir(exist_ok=True)
    suffix = '.private' if is_private(path) else ''
    for older in events.glob('*.private'):
      older.chmod(0o600)
    # The events' file is TensorBoard's own to make.
    with owner_only() if suffix else contextlib.nullcontext():
      self._events = SummaryWriter(
        str(events), filename_suffix=suffix, purge_step=resume_step + 1
      )

  def write(self, step: int, values: dict[str, float | str | None]) -> None:
    """Writes one line, of which finite numbers go to TensorBoard too; others are null."""
    self._file.write(_to_json({'step': step, **values}))
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, (int, float)) and math.isfinite(value):
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    self._file.close()
    self._events.close()


def _to_json(line: dict[str, Any]) -> str:
  finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
  return json.dumps({k: finite(v) for k, v in line.items()}, allow_nan=False) + '\n'


def read_jsonl(path: pathlib.Path) -> list[dict]:
  """The lines of a JSON-lines file, up to one that a crash cut off or damaged."""
  lines = []
  for text in path.read_text(errors='replace').splitlines():
    try:
      line = json.loads(text)
      int(line['step'])
    except (ValueError, KeyError, TypeError):
      break
    lines.append(line)
  return lines
