"""Compiled programs that are kept: they are found again, and hold nothing secret."""

import json
import stat

from jax._src.compilation_cache import decompress_executable

from tools.bench_start import time_start


def test_a_second_run_compiles_nothing_and_no_program_holds_a_key(tmp_path):
  cache = tmp_path / 'cache'
  entries = {}
  for name in ('first', 'second'):
    (tmp_path / name).mkdir()
    if name == 'second':
      (cache / 'dpcap/compiled/left-half-written-cache').touch()
    time_start(['--config=tests/tiny.py'], tmp_path / name, cache)
    entries[name] = {p.name for p in (cache / 'dpcap/compiled').glob('*-cache')}
  assert entries['second'] == entries['first']
  assert any('accumulate' in name for name in entries['first'])
  assert any('update' in name for name in entries['first'])
  assert stat.S_IMODE((cache / 'dpcap/compiled').stat().st_mode) == 0o700

  programs = b''.join(
    decompress_executable(p.read_bytes()) for p in (cache / 'dpcap/compiled').glob('*-cache')
  )
  assert b'threefry' in programs  # it is what is looked for that is read
  for name in ('first', 'second'):
    keys = json.loads((tmp_path / name / 'run.secrets/keys.json').read_text())
    # A compiler folds a constant into its words, which may come up by chance one by one.
    for words, width in ((keys['noise'], 4), (keys['sampling'], 8)):
      assert not all(word.to_bytes(width, 'little') in programs for word in words)
      assert not any(str(word).encode() in programs for word in words)
