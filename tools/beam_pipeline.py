"""The same work on many files, on many machines, by Apache Beam."""

from collections.abc import Callable, Sequence
from typing import Any

from dpcap.errors import UserError


def run(
  work: Callable[[Any], Any], items: Sequence[Any], runner: str, options: Sequence[str]
) -> None:
  """Calls `work` with every item somewhere, and waits for that.

  The pipeline has no output: the files that `work` makes are. Whoever looks for them afterwards
  finds those that could not be made missing.

  Args:
    work: a function of a module that the workers can import.
    items: what it is called with, which can be pickled.
    runner: of Beam.
    options: further ones, as '--name=value', for Beam.

  Raises:
    UserError: Beam is not installed, refuses its options, or the pipeline fails.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as e:
    raise UserError(f"--runner={runner} needs Apache Beam: pip install '.[beam]' ({e})") from e
  try:
    with beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as pipeline:
      # Without the reshuffle Beam would run everything where the list was made.
      _ = pipeline | beam.Create(items) | beam.Reshuffle() | beam.Map(work)
  except Exception as e:  # what runners raise is no closed list
    reason = str(e).strip().partition('\n')[0]
    raise UserError(f'--runner={runner}: Beam says {type(e).__name__}: {reason}') from e
