"""Secret keys, and the ledger of what was drawn with them.

The guarantee holds against whoever does not know the noise and the sampling. Keys
come from the operating system's entropy and live in a directory of their own that
only its owner can read, never in checkpoints, logs or configs. The directory also
counts the steps that were started and keeps a digest of what each released, because every
distinct noisy gradient is a release, also one that a crash threw away:

- A restart does the steps since its checkpoint again, under the same keys. One that comes out
  with the same digest is the same release (same parameters, same draw, same noise): nothing
  new. That holds on any machine, for it is looked at, not inferred.
- One that comes out otherwise (sums that round differently on other devices, other data) must
  never leave the process: under the same noise the difference of two gradients would be laid
  bare. The run goes back to its checkpoint and on under fresh keys, and all steps that had been
  started since count as releases that are lost (`KeyStore.renew`).

Keys that go with one history of parameters are an era. A checkpoint carries the mark of its
own (`KeyStore.mark`): other parameters, as those of a copy of the run that went on by itself,
must not meet this run's noise a second time, nor pass for what it released.
"""

import json
import os
import pathlib
import re
import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpcap.privacy import digests


class Keys(NamedTuple):
  """Noise and sampling keys of a run.

  Attributes:
    noise: two 32-bit words. A JAX threefry key holds 64 bits; all of them are filled.
    sampling: two 64-bit words, the key of Philox.
  """

  noise: tuple[int, int]
  sampling: tuple[int, int]

  @classmethod
  def from_entropy(cls) -> 'Keys':
    """Fresh keys from the operating system's entropy."""
    return cls(
      noise=(secrets.randbits(32), secrets.randbits(32)),
      sampling=(secrets.randbits(64), secrets.randbits(64)),
    )

  @classmethod
  def from_seed(cls, seed: int, number: int = 0) -> 'Keys':
    """Keys that anybody can compute, the `number`-th of a seed: for tests, no guarantee."""
    sequence = np.random.SeedSequence(seed, spawn_key=(number,) if number else ())
    words = [int(w) for w in sequence.generate_state(4, np.uint64)]
    return cls(noise=(words[0] >> 32, words[1] >> 32), sampling=(words[2], words[3]))

  def __repr__(self) -> str:
    return 'Keys(secret)'

  def noise_key(self) -> jax.Array:
    """The noise key as a typed JAX key; `jax.random.key(integer)` would drop bits."""
    return jax.random.wrap_key_data(jnp.asarray(self.noise, jnp.uint32), impl='threefry2x32')


class Era(NamedTuple):
  """A stretch of steps under one pair of keys.

  Attributes:
    id: random; neither secret nor made from the keys.
    start: steps in the checkpoint that it began from; 0: it began from no checkpoint.
    parent: the era of that checkpoint, None at step 0.
  """

  id: str
  start: int
  parent: str | None


class KeyStore:
  """The keys and the ledger of one run, on disk; see the module docstring.

  A step counts as a release from `begin` on, and nothing of it may leave the process before
  `record` of its digest (`privacy.digest` of the noisy sum) has returned True.

  Attributes:
    keys: the Keys in force.
    lost_releases: noisy gradients that were computed and are not in the run's history.
    started: steps of its history that were started.
    renewed: why opening the store drew fresh keys, None if it did not.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    resume_step: int,
    mark: dict[str, str] | None = None,
    plan: dict[str, Any] | None = None,
    seed: int | None = None,
  ):
    """Opens the store, or creates it for a new run.

    Args:
      directory: created with mode 0700.
      resume_step: steps in the checkpoint that the run starts from; 0 for none.
      mark: what `mark` gave for that checkpoint.
      plan: what the accounting rests on (N, q, sigma, ...); one run keeps to one.
      seed: fixed keys for tests, None for entropy.

    Raises:
      ValueError: if the run resumes but its keys are gone, damaged or older than what it
        released, if the checkpoint is none of this run's, or if it resumes with another
        plan or from another kind of keys.
    """
    self._directory = pathlib.Path(directory)
    self._path = self._directory / 'keys.json'
    self._seed, self.renewed = seed, None
    if self._path.exists():
      self._directory.chmod(0o700)
      self._load()
      self._refuse_older_than_digests({era.id for era in self._eras})
      unused = not (self.started or self.lost_releases or resume_step)
      if unused and (self._plan, self._seeded) != (plan, seed is not None):
        self._create(plan)
        return
      if self._plan != plan:
        raise ValueError(f'{self._path}: {_difference(self._plan, plan)}; start in a new workdir')
      if (seed is not None) != self._seeded:
        raise ValueError(
          f'{self._path}: its keys came from {"a seed" if self._seeded else "entropy"} and seed is'
          f' {seed}; a run keeps to one of the two, start in a new workdir'
        )
      self.renewed = self._check(resume_step, mark)
      if self.renewed:
        self.renew(resume_step, mark)
    elif resume_step > 0:
      raise ValueError(
        f'{self._path}: not found, but the run has a checkpoint at step {resume_step}; without'
        ' its keys it cannot go on (bring the directory back, or start in a new workdir)'
      )
    else:
      self._refuse_older_than_digests(set())
      self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
      self._directory.chmod(0o700)
      self._create(plan)

  @staticmethod
  def is_used(directory: str | os.PathLike) -> bool:
    """Whether a store is there under whose keys a step was ever started."""
    path = pathlib.Path(directory) / 'keys.json'
    try:
      state = json.loads(path.read_text())
      return bool(state['started'] or state['lost_releases'])
    except FileNotFoundError:
      return False
    except (ValueError, KeyError, TypeError):
      return True  # damaged: opening it says so

  def begin(self, step: int) -> None:
    """Notes on disk, before its noise is drawn, that `step` is being computed."""
    if step >= self.started:
      self._save(started=step + 1)
      self.started = step + 1

  def record(self, step: int, digest: jax.Array) -> bool:
    """Notes on disk, before anything of `step` leaves the process, what it released.

    Returns:
      False if the step had been recorded and was another release: nothing of it may be kept.
    """
    digest = digests.as_text(digest)
    if step in self._digests:
      return self._digests[step] == digest
    # Begun and not recorded, as by a crash in between, the step never left the process: whatever
    # comes out this time is its first and only release.
    line = f'{step} {digest}\n'.encode()
    descriptor = os.open(self._digests_path(self._era.id), os.O_WRONLY)
    with os.fdopen(descriptor, 'wb') as file:
      # What a write that failed or was cut off left after the last whole line goes.
      file.truncate(self._digests_size)
      file.seek(self._digests_size)
      file.write(line)
      file.flush()
      os.fsync(descriptor)
    self._digests_size += len(line)
    self._digests[step] = digest
    return True

  def mark(self, step: int) -> dict[str, str]:
    """What the checkpoint after `step` steps carries: its era, and what its last step released."""
    return {'era': self._era.id, 'digest': self._digests[step - 1]}

  def renew(self, step: int, mark: dict[str, str] | None) -> None:
    """Fresh keys, under which the run goes on from its checkpoint at `step`, which has `mark`."""
    # Of all that was computed, `step` is in the history that goes on.
    self.lost_releases += self.started - step
    self._start_era(step, mark['era'] if mark else None)

  def releases(self, steps: int) -> int:
    """Distinct noisy gradients computed by the time the run's history has `steps`."""
    return self.lost_releases + steps

  @property
  def _era(self) -> Era:
    return self._eras[-1]

  def _check(self, step: int, mark: dict[str, str] | None) -> str | None:
    """None if the checkpoint goes on under the keys in force, else why it takes fresh ones.

    Raises:
      ValueError: if it is not one that this run may go on from.
    """
    found = f'{self._path}: the checkpoint at step {step}'
    otherwise = 'bring back one of this run, or start in a new workdir'
    if step > 0 and not (mark and mark.keys() >= {'era', 'digest'}):
      raise ValueError(f'{found} does not say under which keys it was made; {otherwise}')
    era = mark['era'] if step > 0 else None
    at_start = (step, era) == (self._era.start, self._era.parent)
    if step > 0:
      # Where the era ended that the checkpoint is of: parameters past it are no part of this run.
      ends = [*(new.start for new in self._eras[1:]), self.started]
      end = {old.id: end for old, end in zip(self._eras, ends)}.get(era)
      if end is None:
        raise ValueError(
          f'{found} was made under the keys of another run, or of a copy of this one (era {era});'
          f' {otherwise}'
        )
      if step > end and era == self._era.id:
        raise ValueError(
          f'{self._path}: knows of {end} steps, but the run has a checkpoint at step {step}; it is'
          ' an old copy, bring back the one that belongs to the checkpoint'
        )
      if step > end:
        raise ValueError(
          f'{found} was made under earlier keys of this run (era {era}), which went on from step'
          f' {end} under others; {otherwise}'
        )
      known = _read_digests(self._digests_path(era))[0].get(step - 1, mark['digest'])
      if known != mark['digest']:
        raise ValueError(
          f'{found} is not what this run computed but a copy of it, under the same keys, which no'
          f' bound here covers; {otherwise}'
        )
    if not at_start and era != self._era.id:
      return f'step {step} is before the keys in force'
    # Only the step that was begun last can lack a digest.
    needed = range(self._era.start, max(step, self.started - 1))
    path = self._digests_path(self._era.id)
    if not path.exists() or any(i not in self._digests for i in needed):
      return f'{path} does not say what every step released'
    return None

  def _refuse_older_than_digests(self, eras: set[str]) -> None:
    for path in self._directory.glob('*.digests'):
      if path.stem not in eras and path.stat().st_size:
        raise ValueError(
          f'{self._path}: does not know the keys under which {path.name} was written; bring back'
          ' the newest copy, or remove the directory to start a new run'
        )

  def _create(self, plan):
    self._plan, self._seeded = plan, self._seed is not None
    self._eras, self.lost_releases = [], 0
    self._start_era(0, None)

  def _start_era(self, step, parent):
    # A new era must not repeat the noise of another one, in tests either.
    number = len(self._eras)
    self.keys = Keys.from_entropy() if self._seed is None else Keys.from_seed(self._seed, number)
    self._eras.append(Era(secrets.token_hex(8), step, parent))
    self._digests, self._digests_size, self.started = {}, 0, step
    # There before the keys are in force: an era without its file has lost it.
    path = self._digests_path(self._era.id)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    self._save(started=step)

  def _digests_path(self, era: str) -> pathlib.Path:
    return self._directory / f'{era}.digests'

  def _save(self, started):
    state = {
      'noise': self.keys.noise,
      'sampling': self.keys.sampling,
      'plan': self._plan,
      'seeded': self._seeded,
      'eras': [era._asdict() for era in self._eras],
      'started': started,
      'lost_releases': self.lost_releases,
    }
    temporary = self._path.with_suffix('.tmp')
    # One that a crash left may be open to others.
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, 'w') as f:
      json.dump(state, f)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, self._path)
    # The new name is on disk only when the directory is.
    directory = os.open(self._directory, os.O_RDONLY)
    try:
      os.fsync(directory)
    finally:
      os.close(directory)

  def _load(self):
    try:
      state = json.loads(self._path.read_text())
      self.keys = Keys(tuple(state['noise']), tuple(state['sampling']))
      self._plan = state['plan']
      self._seeded = bool(state['seeded'])
      self._eras = [Era(str(e['id']), int(e['start']), e['parent']) for e in state['eras']]
      self.lost_releases = int(state['lost_releases'])
      self._digests, self._digests_size = _read_digests(self._digests_path(self._era.id))
      # A ledger behind its own digests is a copy from before: what they say was released.
      self.started = max([int(state['started']), *(step + 1 for step in self._digests)])
    except (ValueError, LookupError, TypeError) as e:
      raise ValueError(f'{self._path}: damaged, cannot read the keys of this run ({e!r})') from e


def _read_digests(path: pathlib.Path) -> tuple[dict[int, str], int]:
  """What each step released, up to a line that a crash cut off, and the bytes up to there."""
  found, size = {}, 0
  for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
    match = re.fullmatch(rb'(\d+) ([0-9a-f]{32})\n', line)
    if not match:
      break
    found[int(match[1])] = match[2].decode()
    size += len(line)
  return found, size


def _difference(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str:
  old, new = old or {}, new or {}
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key):
      return f'this run has {key} = {old.get(key)}, and now it is {new.get(key)}'
  return 'this run has another plan'
