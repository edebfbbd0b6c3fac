"""Compositional understanding as in ARO (Yuksekgonul et al. 2023): which caption is right?

Each case is an image, its caption and one or more false ones of the same words. The captioner
is right where the true caption has the lowest mean token loss.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpcap import data
from dpcap.data import scenes
from dpcap.data.image import decode
from dpcap.data.image_folder import ImageList
from dpcap.data.source import BadRecord
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals.evaluator import SOURCES, Evaluator, at_a_time
from dpcap.evals.intervals import wilson_interval
from dpcap.evals.subject import Result, Subject
from dpcap.key import GIVEN, Key

SCENES_TESTS = ('attributes', 'relations', 'order')
_MAX_WORDS = 30
_FEWEST_ATTRIBUTE_CASES = 25
_TRIES = 20
_SEED = 0  # of what is drawn in a case; with the case's number, so the test is always the same


# From a text to its words, each with 'noun', 'adjective' or ''.
Tagger = Callable[[str], Sequence[tuple[str, str]]]


class Case(NamedTuple):
  """A question to the captioner.

  Attributes:
    image: as `data.Transform.view` takes it.
    captions: the true one first.
    group: what accuracies are also averaged by, such as the relation.
  """

  image: bytes | np.ndarray
  captions: tuple[str, ...]
  group: str


class CaseBatch(NamedTuple):
  """A batch of cases.

  Attributes:
    images: uint8 (B, H, W, 3).
    tokens: int32 (B, K, L).
    groups: (B); '' where a case is left out.
    cut: bool (B), whether the true caption is longer than L tokens.
    alike: bool (B), left out because what tells a false caption from the true one was cut off.
  """

  images: np.ndarray
  tokens: np.ndarray
  groups: list[str]
  cut: np.ndarray
  alike: np.ndarray


def evaluate_scenes(subject: Subject, *, source, test: str, batch_size: int) -> Result:
  """ARO's tests made from the grammar of `scenes`, whose parts of speech are known.

  attributes: the colours of two things swapped; relations: the two things about a relation
  swapped; order: ARO's four shuffles (see `shuffles`), nouns being shapes and adjectives sizes
  and colours. Scenes that cannot be asked about (one thing, the same words) are left out.

  Args:
    subject: the model.
    source: `scenes`, a source section of the config.
    test: one of SCENES_TESTS.
    batch_size: cases at a time.

  Returns:
    The share of right choices; see `_judge`.

  Raises:
    UserError: if the source is not `scenes`, or no case can be used.
  """
  records = subject.make_source(source)
  if not isinstance(records, scenes.Scenes):
    raise UserError(f'aro_scenes: the source is {source["name"]}; it must be scenes')
  choices = 5 if test == 'order' else 2
  cases = _ScenesCases(records, test)
  return _judge(subject, cases, choices, batch_size, fewest=1)


def evaluate_visual_genome(
  subject: Subject, *, annotations: str, images: str, batch_size: int
) -> Result:
  """ARO's Visual Genome tests: relations or attributes swapped, images cropped to their box.

  Args:
    subject: the model.
    annotations: visual_genome_relation.json or visual_genome_attribution.json, as ARO has them.
    images: the folder that `image_path` is in.
    batch_size: cases at a time.

  Returns:
    The share of right choices; see `_judge`. The mean over groups counts relations, or pairs of
    attributes with 25 cases or more.

  Raises:
    UserError: if the annotations cannot be used, or no image can.
  """
  entries = read_annotations(annotations)
  fewest = 1 if 'relation_name' in entries[0] else _FEWEST_ATTRIBUTE_CASES
  source = ImageList(images, [entry['image_path'] for entry in entries])
  return _judge(subject, _VisualGenomeCases(source, entries), 2, batch_size, fewest)


def evaluate_order(subject: Subject, *, annotations: str, images: str, batch_size: int) -> Result:
  """ARO's COCO-order and Flickr30k-order: the caption among four shuffles of its words.

  Every caption of every image is a case, cut to 30 words.

  Args:
    subject: the model.
    annotations: a list of {"image": path, "caption": [text, ...]}, the test split of Karpathy's files.
    images: the folder that paths are in.
    batch_size: cases at a time.

  Returns:
    The share of right choices; see `_judge`. Chance is 20%.

  Raises:
    UserError: if the annotations cannot be used, no image can, or spaCy is not installed.
  """
  entries = read_captions(annotations)
  spacy_tagger()  # if it is not there, say so before anything is read
  source = ImageList(images, [image for image, _ in entries])
  captions = [caption for _, caption in entries]
  return _judge(subject, _OrderCases(source, captions), 5, batch_size, fewest=1)


def read_captions(path: str) -> list[tuple[str, str]]:
  """(image, caption) of a file of images and captions.

  Raises:
    UserError: naming the file and what it lacks.
  """
  pairs = []
  for number, entry in enumerate(_read_list(path)):
    if not isinstance(entry, dict) or not {'image', 'caption'} <= entry.keys():
      raise UserError(f'annotations {path}: entry {number} lacks image or caption')
    captions = entry['caption']
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
      raise UserError(f'annotations {path}: caption of entry {number} is no list of texts')
    pairs += [(entry['image'], caption) for caption in captions]
  return pairs


def _read_list(path: str) -> list:
  try:
    entries = json.loads(pathlib.Path(path).read_bytes())
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'annotations {path}: cannot be read ({e})') from e
  if not isinstance(entries, list) or not entries:
    raise UserError(f'annotations {path}: expected a list of cases that is not empty')
  return entries


def read_annotations(path: str) -> list[dict]:
  """The entries of one of ARO's Visual Genome files.

  Raises:
    UserError: naming the file and what it lacks.
  """
  entries = _read_list(path)
  needed = ['image_path', 'bbox_x', 'bbox_y', 'bbox_w', 'bbox_h', 'true_caption', 'false_caption']
  for number, entry in enumerate(entries):
    missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
    if not missing and not {'relation_name', 'attributes'} & entry.keys():
      missing = ['relation_name or attributes']
    if missing:
      raise UserError(f'annotations {path}: case {number} lacks {", ".join(missing)}')
  return entries


@dataclasses.dataclass(frozen=True)
class _VisualGenomeCases:
  source: ImageList
  entries: list[dict]

  def __len__(self):
    return len(self.entries)

  def __getitem__(self, index: int) -> Case:
    entry = self.entries[index]
    image = decode(self.source[index]['image'])
    x, y, w, h = (int(entry[f'bbox_{key}']) for key in 'xywh')
    box = np.asarray(image)[max(y, 0) : y + h, max(x, 0) : x + w]
    if not box.size:
      raise BadRecord(f'box {x, y, w, h} is outside of the image')
    group = entry.get('relation_name') or '_'.join(entry['attributes'])
    return Case(box, (entry['true_caption'], entry['false_caption']), group)


@dataclasses.dataclass(frozen=True)
class _ScenesCases:
  source: scenes.Scenes
  test: str

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index: int) -> Case:
    scene = self.source.scene(index)
    make = {'attributes': _swap_colors, 'relations': _swap_things, 'order': _shuffle_scene}
    false, group = make[self.test](scene, np.random.default_rng((_SEED, index)))
    record = self.source[index]
    if not false or record['caption'] in false:
      raise BadRecord('the scene has no false caption of this kind')
    return Case(record['image'], (record['caption'], *false), group)


def _swap_colors(scene, rng):
  pairs = [
    (i, j)
    for i in range(len(scene.things))
    for j in range(i)
    if scene.things[i].color != scene.things[j].color
  ]
  if not pairs:
    return (), ''
  i, j = pairs[rng.integers(len(pairs))]
  things = list(scene.things)
  a, b = things[i].color, things[j].color
  things[i], things[j] = things[i]._replace(color=b), things[j]._replace(color=a)
  return (scenes.caption(scene._replace(things=tuple(things))),), '_'.join(sorted((a, b)))


def _swap_things(scene, rng):
  if not scene.relations:
    return (), ''
  i = int(rng.integers(len(scene.relations)))
  things = list(scene.things)
  things[i : i + 2] = reversed(things[i : i + 2])
  return (scenes.caption(scene._replace(things=tuple(things))),), scene.relations[i]


def _shuffle_scene(scene, rng):
  if not scene.relations:
    return (), ''
  return shuffles(scenes.caption(scene), _tag_scene, rng), f'{len(scene.things)} things'


def _tag_scene(caption):
  nouns, adjectives = set(scenes.SHAPES), {*scenes.COLORS, *scenes.SIZES}
  part = lambda word: 'noun' if word in nouns else 'adjective' if word in adjectives else ''
  return [(word, part(word)) for word in caption.split()]


@dataclasses.dataclass(frozen=True)
class _OrderCases:
  source: ImageList
  captions: list[str]

  def __len__(self):
    return len(self.captions)

  def __getitem__(self, index: int) -> Case:
    caption = ' '.join(self.captions[index].split()[:_MAX_WORDS])
    false = shuffles(caption, spacy_tagger(), np.random.default_rng((_SEED, index)))
    if not false:
      raise BadRecord('the caption has an order of words that cannot be changed')
    return Case(self.source[index]['image'], (caption, *false), 'all')


@functools.cache
def spacy_tagger() -> Tagger:
  """Parts of speech by spaCy's small English model, as in ARO.

  Raises:
    UserError: if spaCy or the model is not installed.
  """
  try:
    import spacy  # optional: only this needs it

    tagger = spacy.load('en_core_web_sm', exclude=['parser', 'ner', 'lemmatizer'])
  except (ImportError, OSError) as e:
    raise UserError(
      "aro_order takes spaCy and its English model: pip install 'dpcap[aro]', then python -m spacy"
      ' download en_core_web_sm'
    ) from e
  parts = {'NN': 'noun', 'JJ': 'adjective'}  # plurals, names, comparatives have longer tags
  return lambda text: [(token.text, parts.get(token.tag_[:2], '')) for token in tagger(text)]


def shuffles(caption: str, tag: Tagger, rng: np.random.Generator) -> tuple[str, ...]:
  """ARO's four shuffles of a caption; none if one of them cannot but leave it as it is.

  Nouns among themselves and adjectives among themselves; all other words among themselves; the words
  within each group of three; the groups of three. ARO keeps shuffles that happen to change nothing
  and counts them as right; here they are drawn again.
  """
  words, parts = zip(*tag(caption)) if caption.strip() else ((), ())
  plain = caption.split()
  threes = [plain[i : i + 3] for i in range(0, len(plain), 3)]

  def among(text: list[str], *kinds: str) -> list[str]:
    for kind in kinds:
      places = [i for i, part in enumerate(parts) if part == kind]
      for place, other in zip(places, rng.permutation(places)):
        text[place] = words[other]
    return text

  draws = (
    (words, lambda: among(list(words), 'noun', 'adjective')),
    (words, lambda: among(list(words), '')),
    (plain, lambda: [three[i] for three in threes for i in rng.permutation(len(three))]),
    (plain, lambda: [word for i in rng.permutation(len(threes)) for word in threes[i]]),
  )
  shuffled = []
  for text, draw in draws:
    tries = (draw() for _ in range(_TRIES))
    other = next((new for new in tries if new != list(text)), None)
    if other is None:
      return ()
    shuffled.append(' '.join(other))
  return tuple(shuffled)


@dataclasses.dataclass(frozen=True)
class _Batches:
  """Random access to cases in batches (for `data.iterate`)."""

  cases: _ScenesCases | _VisualGenomeCases | _OrderCases
  transform: data.Transform
  choices: int
  batch_size: int

  @property
  def source(self) -> data.Source:
    return self.cases.source

  def with_source(self, source: data.Source) -> '_Batches':
    return dataclasses.replace(self, cases=dataclasses.replace(self.cases, source=source))

  def __len__(self):
    return math.ceil(len(self.cases) / self.batch_size)

  def __getitem__(self, element: int) -> CaseBatch:
    size, length = self.transform.image_size, self.transform.text_length
    # Always full, so that there is one shape: what is past the end is left out.
    images = np.zeros((self.batch_size, size, size, 3), np.uint8)
    tokens = np.zeros((self.batch_size, self.choices, length), np.int32)
    groups = [''] * self.batch_size
    cut, alike = np.zeros((2, self.batch_size), bool)
    first = int(element) * self.batch_size
    for i in range(min(self.batch_size, len(self.cases) - first)):
      try:
        case = self.cases[first + i]
        images[i] = self.transform.view(case.image)
      except BadRecord:
        continue
      tokens[i] = [self.transform.tokenizer.encode(text, length) for text in case.captions]
      # One token more is [PAD] where the caption fits.
      more = self.transform.tokenizer.encode(case.captions[0], length + 1)
      cut[i] = more[-1] != self.transform.tokenizer.pad_id
      alike[i] = (tokens[i, 1:] == tokens[i, 0]).all(axis=1).any()
      if not alike[i]:
        groups[i] = case.group
    return CaseBatch(images, tokens, groups, cut, alike)


def _judge(subject: Subject, cases, choices: int, batch_size: int, fewest: int) -> Result:
  """Accuracy over all cases that can be asked, with its interval, the chance level, and by group.

  `mean_over_groups` is ARO's figure: the mean of the groups' accuracies, of those groups that
  have the fewest cases that count. A tie with a false caption counts as wrong. `left_out` are all
  cases that cannot be asked, `left_out_for_length` those whose captions are alike once text_length
  has cut them, `true_captions_cut` the asked ones whose true caption is; `note` says so in words.

  Raises:
    UserError: if there is no case.
  """

  @jax.jit
  def losses(variables, images, tokens):
    memory = subject.model.apply(variables, data.normalize(images), method='memory')
    return subject.model.apply(variables, memory[:, None], tokens, method='text_loss')

  def compute(batch):
    spread = functools.partial(batches_lib.spread, size=batch_size)
    losses_BxK = losses(subject.variables, spread(batch.images), spread(batch.tokens))
    losses_BxK = np.asarray(losses_BxK)[: len(batch.groups)]
    right = losses_BxK[:, 0] < losses_BxK[:, 1:].min(axis=1)
    return right, batch.groups, batch.cut, batch.alike

  batches = _Batches(cases, subject.transform, choices, batch_size)
  answers = batches_lib.each(subject, 'aro', batches, compute)
  right, groups, cut, alike = map(np.concatenate, zip(*answers))
  usable = groups != ''
  n = int(usable.sum())
  if not n:
    raise UserError('aro: no case can be used; are the images where the config says?')
  by_group = {
    str(group): {'value': float(right[groups == group].mean()), 'n': int((groups == group).sum())}
    for group in np.unique(groups[usable])
  }
  counted = [entry['value'] for entry in by_group.values() if entry['n'] >= fewest]
  value = float(right[usable].mean())
  alike, cut = int(alike.sum()), int((cut & usable).sum())
  note = ''
  if alike or cut:
    note = (
      f'data.text_length cuts captions: {cut:,} of {n:,} true ones were cut, {alike:,} more cases'
      ' were left out because what differs was cut off'
    )
  return Result(
    'accuracy',
    value,
    n,
    {
      'interval95': wilson_interval(value, n),
      'chance': 1 / choices,
      'left_out': len(cases) - n,
      'left_out_for_length': alike,
      'true_captions_cut': cut,
      'note': note,
      'mean_over_groups': float(np.mean(counted)) if counted else None,
      'groups_counted': len(counted),
      'by_group': by_group,
    },
  )


SCENES = Evaluator(
  evaluate_scenes,
  {
    'source': {'scenes': SOURCES['scenes']},
    'test': Key(str, 'attributes', 'how false captions are made', SCENES_TESTS),
    'batch_size': at_a_time(64, 'cases'),
  },
  needs='text_loss',
)

ORDER = Evaluator(
  evaluate_order,
  {
    'annotations': Key(str, '', 'a list of {image, caption: [...]} as JSON', check=GIVEN),
    'images': Key(str, '', 'folder of the images', check=GIVEN),
    'batch_size': at_a_time(64, 'cases'),
  },
  needs='text_loss',
)

VISUAL_GENOME = Evaluator(
  evaluate_visual_genome,
  {
    'annotations': Key(
      str, '', 'visual_genome_relation.json or visual_genome_attribution.json', check=GIVEN
    ),
    'images': Key(str, '', 'folder of the images', check=GIVEN),
    'batch_size': at_a_time(64, 'cases'),
  },
  needs='text_loss',
)
