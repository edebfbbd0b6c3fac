"""Zero-shot classification through the captioner: which label would it write?

Two methods (Sander et al. 2024 and its code). `likelihood`: the label whose whole text,
prompt + label + [SEP], has the lowest mean token loss. `greedy`: the most probable next token,
again and again, among those that some label's text goes on with.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dpcap import data
from dpcap.data.text import Tokenizer
from dpcap.errors import UserError
from dpcap.evals import batches as batches_lib
from dpcap.evals.accuracy import top1
from dpcap.evals.evaluator import SOURCES, Evaluator, at_a_time
from dpcap.evals.likelihood import text_losses, tokenize
from dpcap.evals.subject import Result, Subject
from dpcap.key import Key

METHODS = ('likelihood', 'greedy')
_TEMPLATES = ('this is a photo of a {}',)
_WORDNET_ID = re.compile(r'^n\d{8}\s+')
_REPEATED_TOLD = 10


def evaluate(
  subject: Subject,
  *,
  source,
  method: str,
  dataset: str | None,
  templates: Sequence[str] | None,
  labels_file: str | None,
  batch_size: int,
) -> Result:
  """Top-1 accuracy, with its 95% interval.

  Args:
    subject: the model.
    source: labelled images, a source section of the config.
    method: one of METHODS.
    dataset: name in the catalogue, whose rules make the source's class names readable; None: as
      they are.
    templates: texts with {} where the label goes. With several, a name's loss is the mean. None:
      those of the dataset (its first one if greedy), without one the paper's.
    labels_file: one class a line, in the order of the labels; None: the source's class names.
      Commas part synonyms, each of which counts for its class. Names that several classes have are
      warned of, and told in the details (`note`).
    batch_size: images at a time.

  Raises:
    UserError: if there are no names, a template does not fit, or no image can be used.
  """
  records = subject.make_source(source)
  known = data.find_dataset(dataset) if dataset else None
  names = _names(records, known, labels_file)
  if templates is None:
    templates = known.templates if known else _TEMPLATES
    templates = templates[:1] if method == 'greedy' else templates
  if not names:
    raise UserError('zero_shot: the source has no class names; give labels_file')
  if labels_file and records.class_names and len(names) != len(records.class_names):
    raise UserError(
      f'zero_shot: labels_file has {len(names)} lines; the source has'
      f' {len(records.class_names)} classes'
    )
  note = _say_repeated(find_repeated(names, subject.transform.tokenizer), labels_file)
  if note:
    logging.warning('zero_shot: %s', note)
  predict = make_classifier(subject, names, method, templates)

  def compute(batch):
    predicted = predict(batches_lib.spread(batch.images, batch_size))
    return batch.labels, predicted[: len(batch.labels)]

  batches = data.EvaluationBatches(records, subject.transform, batch_size)
  answers = batches_lib.each(subject, f'zero-shot by {method}', batches, compute)
  labels, predicted = map(np.concatenate, zip(*answers))
  usable = labels >= 0
  labels, predicted = labels[usable], predicted[usable]
  if not len(labels):
    raise UserError('zero_shot: the source has no usable labelled image')
  if labels.max() >= len(names):
    raise UserError(f'zero_shot: an image has label {labels.max()}; there are {len(names)} names')
  left_out = int(np.sum(~usable))
  return top1(predicted, labels, names, method=method, left_out=left_out, note=note)


def _names(
  records: data.Source, known: data.Dataset | None, labels_file: str | None
) -> tuple[str, ...]:
  if labels_file:
    return read_names(labels_file)
  if known is None:
    return tuple(records.class_names)
  if known.names:
    raise UserError(f'zero_shot: class names of this dataset are {known.names}')
  return data.readable(known, records.class_names)


def read_names(labels_file: str) -> tuple[str, ...]:
  """The lines of a file of class names; WordNet ids at their beginning are left out.

  Raises:
    UserError: if it cannot be read, or a line is empty.
  """
  try:
    text = pathlib.Path(labels_file).read_bytes().decode('utf-8-sig')
  except (OSError, UnicodeError) as e:
    raise UserError(f'labels_file {labels_file}: cannot be read ({e})') from e
  # Not splitlines(), which ends lines at other characters too: all classes after one would shift.
  names = [line.removesuffix('\r') for line in text.removesuffix('\n').split('\n')]
  for number, name in enumerate(names, 1):
    if not name.strip():
      raise UserError(f'labels_file {labels_file}: line {number} is empty; expected a class name')
  return tuple(_WORDNET_ID.sub('', name) for name in names)


def find_repeated(names: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
  """Names, or synonyms, that the tokenizer does not tell apart, and the classes of each.

  The captioner cannot tell them apart either: it predicts the first of these classes for all.
  """
  classes, spelling = collections.defaultdict(list), {}
  for label, name in enumerate(names):
    for synonym in _synonyms(name):
      tokens = tuple(tokenize(tokenizer, synonym))
      spelling.setdefault(tokens, synonym)
      if label not in classes[tokens]:
        classes[tokens].append(label)
  return {spelling[tokens]: labels for tokens, labels in classes.items() if len(labels) > 1}


def _say_repeated(repeated: dict[str, list[int]], labels_file: str | None) -> str:
  if not repeated:
    return ''
  first, kind = (1, f'lines of {labels_file}') if labels_file else (0, 'classes, counted from 0')
  told = [
    f'{name!r} ({", ".join(str(label + first) for label in labels)})'
    for name, labels in itertools.islice(repeated.items(), _REPEATED_TOLD)
  ]
  more = f' and {len(repeated) - len(told):,} more' if len(repeated) > len(told) else ''
  return (
    'several classes have the same name, by which only the first can be predicted:'
    f' {", ".join(told)}{more} ({kind})'
  )


def _synonyms(name: str) -> list[str]:
  return [synonym.strip() for synonym in name.split(',') if synonym.strip()]


def make_classifier(
  subject: Subject, names: Sequence[str], method: str, templates: Sequence[str]
) -> Callable[[np.ndarray], np.ndarray]:
  """The function from uint8 images (B, H, W, 3) to predicted classes (B,), as numpy.

  Raises:
    UserError: for a template that does not fit the method.
  """
  for template in templates:
    if template.count('{}') != 1:
      raise UserError(f'zero_shot: template {template!r} must hold {{}} once, for the label')
  if method == 'greedy' and len(templates) != 1:
    raise UserError(f'zero_shot: method greedy takes one template, got {len(templates)}')
  synonyms = [(label, synonym) for label, name in enumerate(names) for synonym in _synonyms(name)]
  owners = np.array([label for label, _ in synonyms])
  tokenizer = subject.transform.tokenizer
  texts = [
    [tokenize(tokenizer, template.replace('{}', synonym)) for _, synonym in synonyms]
    for template in templates
  ]
  model, cls_id = subject.model, tokenizer.cls_id

  # Variables are arguments: as constants they would be compiled into the program.
  @jax.jit
  def classify(variables, images):
    memory = model.apply(variables, data.normalize(images), method='memory')
    if method == 'greedy':
      return walk(model, variables, memory, make_tree(texts[0], owners, tokenizer), cls_id)
    losses = sum(text_losses(model, variables, memory, some) for some in texts)
    return jnp.asarray(owners)[jnp.argmin(losses, axis=1)]

  return lambda images: np.asarray(classify(subject.variables, images))


class Tree(NamedTuple):
  """The prefix tree of all texts: M nodes with up to K branches, node 0 after [CLS].

  Attributes:
    tokens_MxK: int32, the token of each branch; -1: no branch.
    nodes_MxK: int32, where it leads.
    classes_M: int32, the class of a leaf; -1 elsewhere.
    depth: tokens from [CLS] to the deepest leaf.
  """

  tokens_MxK: np.ndarray
  nodes_MxK: np.ndarray
  classes_M: np.ndarray
  depth: int


def make_tree(texts: Sequence[list[int]], owners: Sequence[int], tokenizer: Tokenizer) -> Tree:
  """The prefix tree of texts [CLS] ... [SEP]; where one ends, '.' and [PAD] end it too.

  Of classes with the same text the first has it. '.' counts where the tokenizer knows it.
  """
  ends = [tokenizer.sep_id, tokenizer.pad_id]
  stop = tokenize(tokenizer, '.')
  if len(stop) == 3 and tokenizer.decode(stop) == '.':
    ends.append(stop[1])
  branches = [{}]
  classes = collections.defaultdict(lambda: -1)

  def go(node, token):
    if token not in branches[node]:
      branches[node][token] = len(branches)
      branches.append({})
    return branches[node][token]

  last = []
  for text, owner in zip(texts, owners):
    node = 0
    for token in text[1:-1]:
      node = go(node, token)
    last.append((node, owner))
  for node, owner in last:
    for token in ends:
      # Where a longer text goes on with '.', that is what '.' means.
      if token not in branches[node]:
        classes[go(node, token)] = int(owner)
  width = max(map(len, branches))
  tokens = np.full((len(branches), width), -1, np.int32)
  nodes = np.zeros((len(branches), width), np.int32)
  for i, branch in enumerate(branches):
    tokens[i, : len(branch)] = list(branch)
    nodes[i, : len(branch)] = list(branch.values())
  leaves = np.array([classes[i] for i in range(len(branches))], np.int32)
  return Tree(tokens, nodes, leaves, max(map(len, texts)) - 1)


def walk(
  model: nn.Module, variables: Any, memory_BxSxD: jax.Array, tree: Tree, cls_id: int
) -> jax.Array:
  """The class (B,) of the leaf to which the most probable branch at each node leads."""
  tokens_MxK, nodes_MxK, classes_M = map(jnp.asarray, tree[:3])

  def branch(node_B, logits_BxV):
    tokens_BxK = tokens_MxK[node_B]
    scores_BxK = jnp.take_along_axis(logits_BxV, jnp.maximum(tokens_BxK, 0), axis=1)
    scores_BxK = jnp.where(tokens_BxK >= 0, scores_BxK, -jnp.inf)
    best_Bx1 = jnp.argmax(scores_BxK, axis=1, keepdims=True)
    token_B, next_B = (
      jnp.take_along_axis(x_BxK, best_Bx1, axis=1)[:, 0]
      for x_BxK in (tokens_BxK, nodes_MxK[node_B])
    )
    # A leaf has no branch: who is there stays, whatever else is decoded.
    return jnp.maximum(token_B, 0), jnp.where(classes_M[node_B] < 0, next_B, node_B)

  opening = jnp.full((len(memory_BxSxD), 1), cls_id, jnp.int32)
  logits, cache = model.apply(variables, memory_BxSxD, opening, tree.depth, method='start')
  start = branch(jnp.zeros(len(memory_BxSxD), jnp.int32), logits[:, -1])

  def step(_, carry):
    cache, (token_B, node_B) = carry
    logits, cache = model.apply(variables, cache, token_B[:, None], method='extend')
    return cache, branch(node_B, logits[:, -1])

  _, (_, node_B) = jax.lax.fori_loop(1, tree.depth, step, (cache, start))
  return classes_M[node_B]


EVALUATOR = Evaluator(
  evaluate,
  {
    'source': SOURCES,
    'method': Key(
      str,
      'likelihood',
      'likelihood: lowest mean token loss; greedy: descent in the tree of the labels',
      METHODS,
    ),
    'dataset': Key(
      str,
      None,
      "name in the catalogue: makes the source's class names readable, has templates",
      data.DATASETS,
      optional=True,
    ),
    'templates': Key(
      tuple,
      None,
      'texts with {} for the label; losses are averaged over them; greedy takes one. None: those of'
      " the dataset (greedy: its first), without one 'this is a photo of a {}'",
      check=(
        lambda x: bool(x) and all(isinstance(t, str) and t.count('{}') == 1 for t in x),
        'one or more texts that hold {} once',
      ),
      optional=True,
    ),
    'labels_file': Key(
      str,
      None,
      "a class a line, synonyms parted by commas; None: the source's class names",
      optional=True,
    ),
    'batch_size': at_a_time(32),
  },
  needs='text_loss',
)
