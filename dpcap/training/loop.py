"""The training loop: draw, accumulate, release, save; stop and resume at any moment."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from dpcap import config as config_lib
from dpcap import data, privacy
from dpcap.errors import UserError
from dpcap.privacy.sampling import augmentation_generator
from dpcap.training import build, metrics, processes
from dpcap.training.checkpoints import Checkpoints
from dpcap.training.damage import set_aside
from dpcap.training.epsilon_curve import EpsilonCurve
from dpcap.training.evaluation import Evaluations
from dpcap.training.fatal_records import FatalRecords
from dpcap.training.initialization import start_from
from dpcap.training.mesh import Layout, make_mesh
from dpcap.training.optimizer import make_optimizer, make_schedule
from dpcap.training.ownership import check_workdir, lock, secrets_directory
from dpcap.training.progress import Progress, doing, plan_line
from dpcap.training.step import TrainState, example_loss, init_state, make_step
from dpcap.training.stop_requests import stop_requests
from dpcap.training.workdir import check_length, publish_statement, read_statement, write_whole


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> TrainState | None:
  """Trains, or goes on training, the run of `config` in `workdir`.

  Args:
    config: validated.
    workdir: created if need be; section 'Workdir' of the README says what it holds.

  Returns:
    The final state, or None if SIGTERM or SIGINT stopped the run, whose state is saved.

  Raises:
    UserError: if the config, the data or the workdir is refused.
  """
  if jax.config.jax_enable_x64:
    raise UserError('JAX_ENABLE_X64 is on; a step is computed in 32 bits, unset it')
  workdir = workdir.resolve()
  if not workdir.name:
    raise UserError(f'--workdir is {workdir}; it must be a directory below another')
  check_length(workdir)
  main = processes.is_main()
  with doing('opening the data', main):
    source = build.make_training_source(config)
  with doing('accounting', main):
    # From one process: calibrated on other machines, noise might differ in its last bits.
    make_plan = lambda: dataclasses.asdict(build.make_plan(config, len(source)))
    plan = privacy.PrivacyPlan(**processes.from_main(make_plan))
  if main:
    print(plan_line(plan), file=sys.stderr)
  try:
    with (
      processes.end_together(),
      stop_requests() as stop,
      lock(workdir),
      _Run(config, workdir, source, plan) as run,
    ):
      while run.done < config.train.steps:
        run.evaluate_if_due()
        if not run.one_step(stop):
          run.save(wait=True)
          run.say(f'stopped after {run.done} steps, saved; the same command goes on')
          return None
      run.save(wait=True)
      run.evaluate_if_due()
      run.say_end()
      return run.state
  except OSError as e:
    raise UserError(f'{e.filename or workdir}: cannot be used ({e.strerror or e})') from e


class _Run:
  """All parts of a run in one place, and what happens to them step by step."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    source: data.Source,
    plan: privacy.PrivacyPlan,
  ):
    self._config, self._workdir, self._source, self._plan = config, workdir, source, plan
    self._groups = getattr(source, 'groups', None)
    self._tokenizer = build.make_tokenizer(config)
    processes.from_main(lambda: check_workdir(config, workdir))
    # Before the manager of checkpoints looks for the newest one.
    for line in processes.from_main(lambda: set_aside(workdir / 'checkpoints')):
      if processes.is_main():
        print(f'warning: {line}', file=sys.stderr)
    self._layout = Layout(make_mesh(config.mesh.model_parallel))
    if jax.process_count() > 1:
      processes.connect(self._layout.mesh)
    self._checkpoints = Checkpoints(workdir / 'checkpoints', config.train.keep_checkpoints)

    model = build.make_model(config, self._tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    self._schedule = make_schedule(config.optimizer, config.train.steps)
    self._clip_function = build.make_clip_function(config)
    self._transform = build.make_transform(config, self._tokenizer)
    self._random_state = functools.partial(
      init_state,
      model,
      optimizer,
      self._layout,
      self._transform.shapes,
      config.train.model_seed,
      averaged=config.train.ema_decay is not None,
    )
    main = processes.is_main()
    with doing('initialising the model', main):
      # One that goes on has a state, which takes the place of this one.
      self._begin(self._checkpoints.latest_step() is None)
    self._clipping = 'none'
    if plan.noisy:
      with doing('checking the clipping', main):
        self._clipping = self._choose_clipping(model)
    self._step = make_step(
      model,
      optimizer,
      plan,
      self._layout,
      self._clipping,
      self._clip_function,
      config.train.ema_decay,
    )
    # As shapes: what is released with a step is donated to it.
    self._like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
    )
    self._store: privacy.KeyStore | None = None  # on the main process
    self._curve = EpsilonCurve(plan)

  def _begin(self, anew: bool = True) -> None:
    """Makes `state` that before the first step: from `train.init`, if set and the run is `anew`."""
    self.state, self._start = self._random_state(), None
    if self._config.train.init and anew:
      start = start_from(self._config.train.init, self._config.train.init_parts, self.state)
      self.state, self._start = start.state, start.record
      if processes.is_main():
        print(start.said, file=sys.stderr)

  def _choose_clipping(self, model: nn.Module) -> str:
    """The strategy that this run's config asks for, once its answer is known to be right."""
    settings = self._config.privacy
    examples = build.synthetic_examples(self._config, self._tokenizer.vocab_size, count=2)
    loss_fn = example_loss(model, self.state.frozen)
    params = self._layout.everywhere(self.state.params)
    strategy = settings.clipping
    if strategy == 'auto':
      strategy = privacy.choose_strategy(loss_fn, params, examples)
    if settings.check_clipping and strategy != 'vmap':
      try:
        privacy.check_clipping(
          loss_fn,
          params,
          examples,
          clip_function=self._clip_function,
          strategy=strategy,
          low_precision=self._config.model.dtype != 'float32',
        )
      except privacy.ClippingMismatch as e:
        raise UserError(f'privacy.clipping: {e}') from e
    return strategy

  def __enter__(self):
    with contextlib.ExitStack() as stack:
      stack.push(self._close_checkpoints)
      stack.callback(self._curve.close)
      # What begins anew with the keys.
      self._parts = stack.enter_context(contextlib.ExitStack())
      self._go_on()
      self._progress = stack.enter_context(
        Progress(
          self._config.train.steps,
          self.done,
          self._plan.expected_batch_size,
          self._plan.private,
          shown=processes.is_main(),
        )
      )
      self._stack = stack.pop_all()
    self._say_start()
    return self

  def _go_on(self, fresh: bool = False) -> None:
    """Goes on from the newest checkpoint, or the start, under `fresh` keys if asked for."""
    self._parts.close()
    self._checkpoints.wait()
    self.done = self._saved = self._checkpoints.latest_step() or 0
    self._warned, self._bad_records = set(), 0
    if self.done:
      self.state = None  # two do not fit everywhere
      self.state = self._checkpoints.restore(self.done, self._like)
      self._start = self._statement_on_disk().get('init')
    elif fresh:
      self._begin()
    keys = privacy.Keys(*map(tuple, processes.from_main(lambda: self._open_store(fresh))))
    self._noise_key = self._layout.everywhere(keys.noise_key())
    self._noise_state = self._plan.make_mechanism().init(
      self._noise_key, self.done, self.state.params
    )
    # Before there are other threads: who may read new files is a matter of the whole process.
    self._metrics = self._diagnostics = None
    if processes.is_main():
      self._metrics = metrics.MetricWriter(self._workdir, metrics.METRICS, self.done)
      self._parts.callback(self._metrics.close)
    if processes.is_main() and self._config.train.diagnostics:
      self._diagnostics = metrics.MetricWriter(self._workdir, metrics.DIAGNOSTICS, self.done)
      self._parts.callback(self._diagnostics.close)
    self._batches = self._make_batches(keys)
    self._elements = self._load()
    self._parts.callback(self._elements.close)

  def _statement_on_disk(self) -> dict[str, Any]:
    """That of the checkpoint that the run goes on from."""
    return read_statement(pathlib.Path(self._checkpoints.path(self.done)))

  def _load(self) -> Iterator[list[data.Chunk]]:
    """The chunks of all slots to come; a record that ends its worker is left out from then on."""
    slots = self._batches.slots
    fatal = FatalRecords(
      secrets_directory(self._workdir), jax.process_index(), self._source.fingerprint
    )
    return data.iterate(
      self._batches,
      self.done * slots,
      self._config.data.workers,
      timeout_s=self._config.data.worker_timeout_s,
      fatal={record: step * slots for record, step in processes.from_main(fatal.read)},
      found=lambda record, element: fatal.add(record, element // slots),
      say=self._warn,
    )

  def _open_store(self, fresh: bool) -> privacy.Keys:
    """Opens or renews keys and ledger, which only the main process does, and what follows."""
    mark = None
    if self.done:
      mark = self._statement_on_disk().get('ledger')
    if fresh:
      self._store.renew(self.done, mark)
    else:
      # Under other groups a step is of other units, also where they are as many.
      of_groups = {'groups': self._groups.digest} if self._groups else {}
      try:
        self._store = privacy.KeyStore(
          secrets_directory(self._workdir),
          resume_step=self.done,
          mark=mark,
          plan=dataclasses.asdict(self._plan) | of_groups,
          seed=self._config.privacy.seed,
        )
      except ValueError as e:
        raise UserError(str(e)) from e
      # After the keys: a config without keys is a run that lost them.
      write_whole(self._workdir / 'config.json', config_lib.to_json(self._config) + '\n')
    if not self.done:
      (self._workdir / 'privacy.json').unlink(missing_ok=True)
    publish_statement(self._workdir)
    self._forget_evaluations()
    return self._store.keys

  def _forget_evaluations(self) -> None:
    """Removes those of steps to come, whose parameters may become others."""
    for folder in self._workdir.glob('evals/step_*'):
      step = folder.name.removeprefix('step_')
      if step.isdecimal() and int(step) > self.done:
        shutil.rmtree(folder)

  def _make_batches(self, keys: privacy.Keys) -> data.LogicalBatches:
    config = self._config
    return data.LogicalBatches(
      source=self._source,
      transform=self._transform,
      draw=self._plan.make_sampler(keys.sampling).draw,
      augmentation_rng=functools.partial(augmentation_generator, keys.sampling),
      steps=config.train.steps,
      expected_batch_size=self._plan.expected_batch_size,
      physical_batch=config.mesh.physical_batch,
      batches_per_chunk=config.mesh.batches_per_chunk,
      rows=self._layout.rows,
      local_rows=self._layout.local_rows,
    )

  def _say_start(self) -> None:
    """Tells where the run begins, what it does again, and what it has lost."""
    if not processes.is_main():
      return
    store, plan = self._store, self._plan
    if self.done:
      self.say(f'resuming after step {self.done}')
    if store.started > self.done:
      self.say(
        f'steps {self.done + 1} to {store.started} had been started: they are done again, and'
        ' count once where they come out in the same bits'
      )
    if store.renewed:
      self.say(f'warning: fresh keys are in force: {store.renewed}')
    if store.lost_releases:
      self.say(
        f'warning: {store.lost_releases} noisy gradients were computed that are not in the history'
        ' of this run: they count as released; the whole run will spend epsilon'
        f' {plan.epsilon(store.releases(plan.steps)):.3f} instead of {plan.epsilon():.3f}'
      )

  def __exit__(self, *failure):
    return self._stack.__exit__(*failure)

  def _close_checkpoints(self, kind, *_):
    # A failure keeps its own message, and what is being written is still finished.
    with contextlib.suppress(*([UserError] if kind else [])):
      self._checkpoints.close()

  def say(self, line: str) -> None:
    """Tells the person who trains, on the main process."""
    if processes.is_main():
      self._progress.say(line)

  def one_step(self, stop: list[int]) -> bool:
    """Does the next step and what is due after it; False if asked to stop before its release.

    A step that had been done before and comes out otherwise is forgotten: the run goes back.
    """
    accumulator, bad, reasons = self._step.zero(self.state.params), 0, ()
    moments = itertools.count(self.done * (self._batches.slots + 1))
    for slot in range(self._batches.slots):
      if processes.stop_is_due(stop, next(moments)):
        return False
      for chunk in next(self._elements):
        inputs = jax.make_array_from_process_local_data(
          self._layout.by_row(), (chunk.examples, chunk.mask, chunk.live)
        )
        # Wait for the chunk before, so that inputs do not pile up on the device; the
        # next ones are being loaded meanwhile.
        jax.block_until_ready(accumulator)
        accumulator = self._step.accumulate(self.state, accumulator, *inputs)
        bad, reasons = bad + chunk.bad, reasons or chunk.reasons
      self._progress.within_step(self.done, (slot + 1) / self._batches.slots)
    jax.block_until_ready(accumulator)
    if processes.stop_is_due(stop, next(moments)):
      return False

    # From here on the step counts as released, whatever happens. The other processes cannot
    # have any of its sum before the main one gives its part.
    if processes.is_main():
      self._store.begin(self.done)
    self.state, self._noise_state, diagnostics, digest = self._step.update(
      self.state, accumulator, self._noise_key, self._noise_state
    )
    # Until its digest is on disk nothing of the step leaves this process, nor, past the gather,
    # any other.
    exact = not processes.is_main() or self._store.record(self.done, digest)
    gathered = processes.gather(np.array([bad, not exact], np.int32))
    if gathered[:, 1].any():
      step = self.done + 1
      self._go_on(fresh=True)
      self.say(
        f'warning: step {step}, done again, came out in other bits than before (another machine,'
        ' version, setting, or other data?): nothing of it is kept, and fresh keys are in force'
      )
      self._say_start()
      return True
    self.done += 1
    self._warn_of_bad(bad, reasons)
    bad = int(gathered[:, 0].sum())
    self._bad_records += bad
    self._report(
      {k: float(v) for k, v in diagnostics.items()}
      | {'bad_records': bad, 'bad_records_so_far': self._bad_records}
    )
    if self.done % self._config.train.checkpoint_every == 0:
      self.save()
    return True

  def save(self, wait: bool = False) -> None:
    """Starts to write a checkpoint of the current state, unless there is one.

    The statement becomes the workdir's privacy.json once its checkpoint is whole: at the
    next save, or now if `wait`.
    """
    if self._saved != self.done:
      statement = processes.from_main(
        lambda: self.statement() | {'ledger': self._store.mark(self.done)}
      )
      self._checkpoints.save(self.state, statement)  # waits for the one before
      self._publish()
      self._saved = self.done
    if wait:
      self._checkpoints.wait()
      self._publish()

  def _publish(self) -> None:
    if processes.is_main():
      publish_statement(self._workdir)

  def evaluate_if_due(self) -> None:
    """Evaluates the checkpoint of this step, if the config says so and it was not done before."""
    folder = self._workdir / 'evals' / f'step_{self.done}'
    names = self._config.evals.keys()
    if self.done not in self._config.train.evaluate_at or processes.from_main(
      lambda: all((folder / f'{name}.json').exists() for name in names)
    ):
      return
    self.save(wait=True)
    self.say(f'step {self.done}: evaluating')
    with self._progress.paused():
      results = Evaluations(self._config).run(
        self._layout.everywhere(self.state.variables),
        self._checkpoints.path(self.done),
        folder,
        cache=self._workdir / 'evals' / 'cache',
      )
    for name, result in results.items():
      self.say(f'step {self.done}: {name} {result.metric} {result.value:.1%} (n = {result.n:,})')

  def statement(self) -> dict[str, Any]:
    """The privacy statement of the current state, on the main process."""
    source, groups = self._config.data.source.name, self._groups
    fields, not_covered = self._transform.fields, [groups.not_covered] if groups else []
    if 'tokens' in fields:
      tokenizer = f'{self._config.data.tokenizer} {self._config.data.vocabulary or ""}'.strip()
      not_covered += [
        f'the vocabulary or filters, if they were made from the private data (here: {tokenizer})'
      ]
    if 'label' in fields:
      not_covered += [
        'the list of classes and its order, if it was made from the labels of the private data'
      ]
    return privacy.make_statement(
      self._plan,
      steps=self.done,
      releases=self._store.releases(self.done),
      clipping_strategy=self._clipping,
      clip_function=str(self._clip_function),
      unit=data.unit(fields, groups),
      fixed_seed=self._config.privacy.seed is not None,
      not_covered=[
        'diagnostics: files named *.private.* in the workdir, and what the screen showed',
        *not_covered,
        'evaluations that read the training data (marked uses_training_data in evals/)',
      ],
      data={'source': source, 'generated': source in data.GENERATED},
      start=self._start,
    )

  def _report(self, diagnostics: dict[str, float]) -> None:
    unusable, examples = diagnostics['unusable_gradients'], diagnostics['examples']
    if unusable and processes.is_main():
      self._warn_once(
        'unusable',
        f'step {self.done}: {unusable:.0f} of {examples:.0f} examples had a gradient that is'
        ' not finite (loss NaN?); they contribute zero, the run goes on',
      )
    epsilon = None
    every, last = self._config.train.log_every, self._config.train.steps
    if self.done in (1, last) or self.done % every == 0:
      if self._metrics:
        epsilon = self._curve.at(self._store.releases(self.done))
        following = min(self.done - self.done % every + every, last)
        self._curve.expect(self._store.releases(following))
        self._metrics.write(
          self.done,
          {
            'epsilon': privacy.accounting.finite_or_none(epsilon),
            'learning_rate': float(self._schedule(self.done - 1)),
            'images_per_second': self._progress.images_per_second,
          },
        )
      if self._diagnostics:
        self._diagnostics.write(self.done, diagnostics)
    loss = diagnostics['loss']
    self._progress.after_step(self.done, loss if math.isfinite(loss) else None, epsilon)

  def say_end(self) -> None:
    """Tells what the run reveals, and what was wrong with its data."""
    if self._bad_records:
      self.say(f'{self._bad_records:,} drawn records could not be used and contributed zero')
    if processes.is_main():
      self.say(privacy.statement_text(self.statement()))

  def _warn_of_bad(self, count: int, reasons: tuple[str, ...]) -> None:
    if count:
      self._warn_once(
        'bad',
        f'step {self.done}: {count} drawn records cannot be used and contribute zero'
        f' ({"; ".join(reasons)}); further ones are only counted',
      )

  def _warn_once(self, kind: str, line: str) -> None:
    if kind not in self._warned:
      self._warned.add(kind)
      self._warn(line)

  def _warn(self, line: str) -> None:
    where = '' if processes.is_main() else f'process {jax.process_index()}: '
    self._progress.say(f'warning: {where}{line}')
