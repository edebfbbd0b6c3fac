"""What a checkpoint was trained on, and whether an evaluation of it reads any of that."""

import functools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpcap import data, privacy
from dpcap.errors import UserError
from dpcap.training.workdir import read_statement


class Verdict(NamedTuple):
  """Whether a result may be published.

  Attributes:
    uses_training_data: False only where all that was read is known, or declared, to be apart from
      the training data.
    declared: whether the config decided it (`evals.NAME.apart`), not the records.
    why: for people.
  """

  uses_training_data: bool
  declared: bool
  why: str


class TrainingData:
  """The training data of the run that made a checkpoint, as far as they can be seen from here.

  The run's own config.json tells which, whatever the config of an evaluation says. They are opened
  when a source of the same kind is to be told apart from them, not before. Those of the weights
  that it started from count as well, unless they are generated: nothing in them is private.
  """

  def __init__(self, checkpoint: str, statement: dict[str, Any] | None = None):
    """The data of a checkpoint.

    Args:
      checkpoint: WORKDIR/checkpoints/STEP, which a run that goes on may remove later.
      statement: its own; None: as it lies there.
    """
    self._checkpoint = pathlib.Path(checkpoint).resolve()
    try:
      self._statement = statement or read_statement(self._checkpoint)
    except UserError as e:
      self._statement = e
    self._relations: dict[data.Contents, data.Relation] = {}

  def judge(self, sources: Sequence[data.Source], apart: bool | None) -> Verdict:
    """What follows from the sources that an evaluation read.

    Args:
      sources: all of them; none: nobody knows what it read.
      apart: what the config declares. True holds only where it cannot be told from the records.
    """
    if apart is False:
      return Verdict(True, True, 'the config declares that it is not apart')
    nothing = data.Relation(None, 'it read its images in a way that is not known')
    reasons = {True: [], False: [], None: []}
    found = (link._relation_to(source) for link in self._chain() for source in sources)
    for relation in found if sources else [nothing]:
      reasons[relation.apart].append(relation.why)
    say = lambda apart: '; '.join(dict.fromkeys(reasons[apart]))
    if reasons[False]:
      return Verdict(True, False, say(False))
    if not reasons[None]:
      return Verdict(False, False, say(True))
    if apart:
      return Verdict(False, True, f'declared by the config, it cannot be told: {say(None)}')
    return Verdict(True, False, f'it cannot be told: {say(None)}')

  def _chain(self) -> Iterator['TrainingData']:
    """This, and the data of what the run started from."""
    yield self
    start = None if isinstance(self._statement, UserError) else self._statement.get('init')
    if start and not privacy.is_generated(start['statement']):
      yield from TrainingData(start['path'], start['statement'])._chain()

  def _relation_to(self, source: data.Source) -> data.Relation:
    """Evaluations share sources, and 234 million records are compared once."""
    contents = source.contents
    if contents not in self._relations:
      self._relations[contents] = self._compare(contents)
    return self._relations[contents]

  def _compare(self, contents: data.Contents) -> data.Relation:
    try:
      kinds = data.compare_kinds(self._kind, contents.kind)
      return data.compare(self._contents, contents) if kinds is None else kinds
    # A config of another version may hold anything.
    except (UserError, OSError, ValueError, LookupError, TypeError) as e:
      return data.Relation(None, f'the training data of {self._checkpoint} cannot be seen ({e})')

  @property
  def _kind(self) -> str:
    """Of the source, by config and statement: a path may lead to a run that is another by now."""
    if isinstance(self._statement, UserError):
      raise self._statement
    if 'origin' in self._statement:
      raise UserError('weights from elsewhere, of unknown training')
    kind = self._config['source']['name']
    recorded = (self._statement.get('data') or {}).get('source', kind)
    if recorded != kind:
      raise UserError(f'{kind} are there, it was trained on {recorded}')
    return kind

  @functools.cached_property
  def _config(self) -> dict:
    """The section `data` of the run's config."""
    return json.loads((self._checkpoint.parents[1] / 'config.json').read_text())['data']

  @functools.cached_property
  def _contents(self) -> data.Contents:
    source = data.make_source(image_size=self._config['image_size'], **self._config['source'])
    if len(source) != self._statement['dataset_size']:
      raise UserError(
        f'{len(source)} records are there, it was trained on {self._statement["dataset_size"]}'
      )
    return source.contents
