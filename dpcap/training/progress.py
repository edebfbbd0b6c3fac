"""What the person who trains sees: a progress bar; where there is no terminal, a line now and then."""

import contextlib
import sys
import threading
import time

from rich import progress
from rich.console import Console

from dpcap import privacy

# Between lines where there is no terminal to draw a bar on.
_SECONDS_BETWEEN_LINES = 10.0

# What takes longer is told of.
_WORTH_TELLING = 1.0


@contextlib.contextmanager
def doing(what: str, shown: bool = True):
  """Tells what goes on before there is a bar: at once on a terminal, elsewhere if it takes long."""
  console = Console(file=sys.stderr, highlight=False)
  if not shown:
    yield
  elif console.is_terminal:
    with console.status(f'{what} ...'):
      yield
  else:
    timer = threading.Timer(_WORTH_TELLING, lambda: console.print(f'{what} ...', soft_wrap=True))
    timer.daemon = True
    timer.start()
    try:
      yield
    finally:
      timer.cancel()


class Progress:
  """Shows steps, loss, epsilon spent, images per second and time left."""

  def __init__(
    self, steps: int, start: int, expected_batch_size: int, private: bool, shown: bool = True
  ):
    """Starts at step `start` of `steps`; rates count expected_batch_size images a step.

    Not `shown` it still says lines.
    """
    self._steps, self._start, self._batch = steps, start, expected_batch_size
    self._done = start
    self._fields = {'loss': '-', 'epsilon': '-' if private else 'inf', 'rate': '-'}
    self._began = time.monotonic()
    self._last_line = 0.0
    self._console = Console(file=sys.stderr)
    self._shown = shown
    self._bar = progress.Progress(
      progress.TextColumn('{task.description}'),
      progress.BarColumn(),
      progress.TextColumn('step {task.fields[steps]}'),
      progress.TextColumn('loss [bold]{task.fields[loss]}'),
      progress.TextColumn('epsilon [bold]{task.fields[epsilon]}'),
      progress.TextColumn('{task.fields[rate]} images/s'),
      progress.TimeRemainingColumn(),
      console=self._console,
      disable=not (shown and self._console.is_terminal),
    )
    self._task = self._bar.add_task('compiling', total=steps, completed=start, steps='', **self._fields)

  def __enter__(self):
    self._bar.start()
    if self._shown and not self._console.is_terminal:
      self.say('compiling the step ...')
    return self

  def __exit__(self, *_):
    self._bar.stop()

  @property
  def images_per_second(self) -> float:
    """Since the start of this process."""
    elapsed = time.monotonic() - self._began
    return (self._done - self._start) * self._batch / max(elapsed, 1e-9)

  def within_step(self, step: int, fraction: float) -> None:
    """Notes how far step `step` has come."""
    self._done = step + min(fraction, 1.0)
    self._show()

  def after_step(self, done: int, loss: float | None, epsilon: float | None) -> None:
    """Notes that `done` steps are done; None leaves what was shown."""
    self._done = done
    if loss is not None:
      self._fields['loss'] = f'{loss:.3f}'
    if epsilon is not None:
      self._fields['epsilon'] = f'{epsilon:.2f}'
    self._show()
    now = time.monotonic()
    due = now - self._last_line > _SECONDS_BETWEEN_LINES or done == self._steps
    if self._shown and not self._console.is_terminal and due:
      self._last_line = now
      left = (self._steps - done) * self._batch / max(self.images_per_second, 1e-9)
      self.say(
        f'step {done}/{self._steps}  loss {self._fields["loss"]}  epsilon'
        f' {self._fields["epsilon"]}  {self._fields["rate"]} images/s  {left:.0f} s left'
      )

  @contextlib.contextmanager
  def paused(self):
    """Takes the bar away while something else goes on, whose time does not count."""
    began = time.monotonic()
    self._bar.stop()
    try:
      yield
    finally:
      self._began += time.monotonic() - began
      self._bar.start()

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    self._console.print(line, highlight=False, soft_wrap=True)

  def _show(self):
    self._fields['rate'] = f'{self.images_per_second:,.0f}'
    self._bar.update(
      self._task,
      description='training',
      completed=self._done,
      steps=f'{int(self._done)}/{self._steps}',
      **self._fields,
    )


def plan_line(plan: privacy.PrivacyPlan) -> str:
  """What a run is about to do, and what it will guarantee."""
  run = plan.simulated
  if plan.private:
    guarantee = f'{_epsilon_text(plan)}, clip norm {plan.clip_norm:g}'
  elif run:
    guarantee = (
      f'noise multiplier {plan.noise_multiplier:.4g}: NO privacy, a simulation of batch'
      f' {run.expected_batch_size:,} ({_epsilon_text(run)})'
    )
  else:
    guarantee = 'epsilon infinity: NO privacy'
  return (
    f'N {plan.dataset_size:,}  batch {plan.expected_batch_size:,}  q'
    f' {plan.sampling_probability:.3g}  steps {plan.steps:,}'
    f' ({plan.steps * plan.sampling_probability:.1f} epochs)  {guarantee}'
  )


def _epsilon_text(plan: privacy.PrivacyPlan) -> str:
  return (
    f'epsilon {plan.epsilon():.3f} ({plan.accountant.upper()}), delta {plan.delta:.3g},'
    f' noise multiplier {plan.noise_multiplier:.4f}'
  )
