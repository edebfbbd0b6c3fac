"""Indexes tar shards on many machines, by Apache Beam."""

from dpcap.data.byte_ranges import is_local
from dpcap.data.tar_index import Wanted, try_index_shard
from dpcap.errors import UserError


def run(
  shards: list[str], wanted: Wanted, index_dir: str | None, runner: str, options: list[str]
) -> None:
  """Makes the index of every shard, and waits for that.

  The pipeline has no output: the index files are. A shard that cannot be read there has none, and
  whoever looks for it afterwards finds out why.

  Args:
    shards: paths or URLs that the workers reach.
    wanted: what the indexes have to hold.
    index_dir: where they go, see `index_shard`.
    runner: of Beam.
    options: further ones, as '--name=value', for Beam.

  Raises:
    UserError: Beam is not installed, it refuses its options, or remote shards lack an index_dir.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as e:
    raise UserError(f"--runner={runner} needs Apache Beam: pip install 'dpcap[beam]' ({e})") from e
  if index_dir is None and not all(map(is_local, shards)):
    raise UserError('--index_dir is missing; it must be a place that all workers of Beam reach')
  try:
    pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(options))
  except ValueError as e:
    raise UserError(f'--runner={runner}: refused by Beam ({e})') from e
  with pipeline:
    # Without the reshuffle Beam would run everything where the list was made.
    listed = pipeline | beam.Create(shards) | beam.Reshuffle()
    _ = listed | beam.Map(try_index_shard, wanted, index_dir)
