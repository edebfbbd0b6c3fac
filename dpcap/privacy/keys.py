"""Secret keys, and the ledger of what was drawn with them.

The guarantee holds against whoever does not know the noise and the sampling. Keys
come from the operating system's entropy and live in a directory of their own that
only its owner can read, never in checkpoints, logs or configs. The directory also
counts the steps that were started, because every distinct noisy gradient is a release,
also one that a crash threw away:

- A restart in the same environment replays the steps since the last checkpoint exactly
  (same parameters, same draw, same noise), which releases nothing new.
- A restart whose environment differs (other devices, other library versions: sums may
  round differently) can't replay exactly. Under the same noise the difference of two
  gradients would be laid bare. It gets fresh keys, and the steps it does again count
  a second time.
"""

import json
import os
import pathlib
import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
  def from_seed(cls, seed: int) -> 'Keys':
    """Keys that anybody can compute: for tests, no guarantee."""
    words = [int(w) for w in np.random.SeedSequence(seed).generate_state(4, np.uint64)]
    return cls(noise=(words[0] >> 32, words[1] >> 32), sampling=(words[2], words[3]))

  def __repr__(self) -> str:
    return 'Keys(secret)'

  def noise_key(self) -> jax.Array:
    """The noise key as a typed JAX key; `jax.random.key(integer)` would drop bits."""
    return jax.random.wrap_key_data(jnp.asarray(self.noise, jnp.uint32), impl='threefry2x32')


class KeyStore:
  """The keys and the ledger of one run, on disk; see the module docstring.

  Attributes:
    keys: the Keys in force.
    lost_releases: noisy gradients that were computed and are not in the run's history.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    resume_step: int,
    environment: str,
    plan: dict[str, Any] | None = None,
    seed: int | None = None,
  ):
    """Opens the store, or creates it for a new run.

    Args:
      directory: created with mode 0700.
      resume_step: steps in the checkpoint that the run starts from; 0 for a new run.
      environment: describes all that decides the bits of a step besides the keys.
      plan: what the accounting rests on (N, q, sigma, ...); one run keeps to one.
      seed: fixed keys for tests, None for entropy.

    Raises:
      ValueError: if the run resumes but its keys are gone, damaged or older than its
        checkpoint, or if it resumes with another plan or from another kind of keys.
    """
    self._directory = pathlib.Path(directory)
    self._path = self._directory / 'keys.json'
    if self._path.exists():
      self._load()
      unused = not (self._started or self.lost_releases or resume_step)
      if unused and (self._plan, self._seeded) != (plan, seed is not None):
        self._plan = plan
        self._start_era(0, environment, seed)
        return
      if self._plan != plan:
        raise ValueError(f'{self._path}: {_difference(self._plan, plan)}; start in a new workdir')
      if resume_step > self._started:
        raise ValueError(
          f'{self._path}: knows of {self._started} steps, but the run has a checkpoint at step'
          f' {resume_step}; it is an old copy, bring back the one that belongs to the checkpoint'
        )
      if (seed is not None) != self._seeded:
        raise ValueError(
          f'{self._path}: its keys came from {"a seed" if self._seeded else "entropy"} and seed is'
          f' {seed}; a run keeps to one of the two, start in a new workdir'
        )
      if self._environment != environment or resume_step < self._era_start:
        self.lost_releases += max(0, self._started - resume_step)
        self._start_era(resume_step, environment, seed)
    elif resume_step > 0:
      raise ValueError(
        f'{self._path}: not found, but the run has a checkpoint at step {resume_step}; without'
        ' its keys it cannot go on (bring the directory back, or start in a new workdir)'
      )
    else:
      self.lost_releases = 0
      self._plan = plan
      self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
      self._directory.chmod(0o700)
      self._start_era(0, environment, seed)

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
    if step >= self._started:
      self._save(started=step + 1)
      self._started = step + 1

  def releases(self, steps: int) -> int:
    """Distinct noisy gradients computed by the time the run's history has `steps`."""
    return self.lost_releases + steps

  def _start_era(self, step, environment, seed):
    if seed is None:
      self.keys = Keys.from_entropy()
    else:
      # A new era must not repeat the noise of the last one, in tests either.
      self.keys = Keys.from_seed(seed + self.lost_releases)
    self._environment = environment
    self._seeded = seed is not None
    self._era_start = self._started = step
    self._save(started=step)

  def _save(self, started):
    state = {
      'noise': self.keys.noise,
      'sampling': self.keys.sampling,
      'environment': self._environment,
      'plan': self._plan,
      'seeded': self._seeded,
      'era_start': self._era_start,
      'started': started,
      'lost_releases': self.lost_releases,
    }
    temporary = self._path.with_suffix('.tmp')
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
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
      self._environment = str(state['environment'])
      self._plan = state['plan']
      self._seeded = bool(state['seeded'])
      self._era_start = int(state['era_start'])
      self._started = int(state['started'])
      self.lost_releases = int(state['lost_releases'])
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(f'{self._path}: damaged, cannot read the keys of this run ({e!r})') from e


def _difference(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str:
  old, new = old or {}, new or {}
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key):
      return f'this run has {key} = {old.get(key)}, and now it is {new.get(key)}'
  return 'this run has another plan'
