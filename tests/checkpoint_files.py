"""The files of a checkpoint that is whole by its files, without arrays: for who reads the rest."""

import json

from dpcap.training import damage


def write(checkpoint, statement):
  """Writes them to that directory."""
  for name in damage._FILES:
    path = checkpoint / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  (checkpoint / 'privacy/metadata').write_text(json.dumps(statement))
