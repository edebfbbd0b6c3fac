"""What a run writes about itself, public and private apart.

`metrics.jsonl` holds what follows from the config and the clock. Everything derived from
private data (loss, norms, counts) is outside the guarantee: it goes to files whose name
says so, `diagnostics.private.jsonl` and TensorBoard events ending in `.private`, and is
switched off by `train.diagnostics=False`.
"""

import json
import pathlib

from tensorboardX import SummaryWriter

METRICS = 'metrics.jsonl'
DIAGNOSTICS = 'diagnostics.private.jsonl'


class MetricWriter:
  """Appends numbers to a JSON-lines file and to TensorBoard events."""

  def __init__(self, workdir: pathlib.Path, name: str, resume_step: int, suffix: str = ''):
    """Opens `workdir / name`, dropping lines past `resume_step`: they are replayed."""
    path = workdir / name
    if path.exists():
      kept = [line for line in read_jsonl(path) if line['step'] <= resume_step]
      write_whole(path, ''.join(json.dumps(line) + '\n' for line in kept))
    self._file = path.open('a')
    self._events = SummaryWriter(
      str(workdir / 'tensorboard'), filename_suffix=suffix, purge_step=resume_step + 1
    )

  def write(self, step: int, values: dict[str, float | str | None]) -> None:
    """Writes one line; numbers go to TensorBoard too."""
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      if isinstance(value, (int, float)):
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    self._file.close()
    self._events.close()


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


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it is never seen half written."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)
