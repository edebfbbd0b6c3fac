"""The schema of a config: every key, its type, its default and what is allowed.

An experiment is a Python file whose `get_config` starts from `base_config()` and changes
what is its own. `validate` refuses what does not fit before anything starts.
"""

import copy
import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpcap import data, evals, models, privacy
from dpcap.errors import UserError


@dataclasses.dataclass(frozen=True)
class Key:
  """One entry of a config.

  Attributes:
    kind: its type; an int does for a float.
    default: None needs `optional`.
    help: what it means, with units.
    allowed: the values it may take, if they can be listed.
    check: what it must fulfil, as (predicate, its description).
    optional: whether None is allowed.
    fixed: whether a run that resumes must keep it, because it bears on what is computed.
  """

  kind: type
  default: Any
  help: str
  allowed: tuple[str, ...] | None = None
  check: tuple[Callable[[Any], bool], str] | None = None
  optional: bool = False
  fixed: bool = True


_GIVEN = (bool, 'given')
_POSITIVE = (lambda x: x > 0, 'above 0')
_NOT_NEGATIVE = (lambda x: x >= 0, '0 or more')
_FRACTION = (lambda x: 0 <= x < 1, 'from 0 to below 1')
_AREA_RANGE = (
  lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
  'two fractions of the area, 0 < smallest <= largest <= 1',
)

SECTIONS = {
  'model': {
    'name': Key(str, 'captioner', 'what is trained', tuple(models.MODELS)),
    'size': Key(str, 'base', 'its size', tuple(models.SIZES)),
    'patch_size': Key(int, None, "pixels; None: the size's own", check=_POSITIVE, optional=True),
    'dtype': Key(str, 'float32', 'compute type; parameters are float32', tuple(models.DTYPES)),
    'scan_blocks': Key(
      bool, False, 'compile one block of each kind, which runs as a scan; parameters are stacked'
    ),
  },
  'data': {
    'image_size': Key(int, 224, 'side of the images, pixels', check=_POSITIVE),
    'text_length': Key(
      int, 40, 'tokens, with [CLS] and [SEP]', check=(lambda x: x >= 3, 'at least 3')
    ),
    'tokenizer': Key(str, 'bytes', 'how captions become tokens', tuple(data.TOKENIZERS)),
    'vocabulary': Key(str, None, 'WordPiece vocabulary file', optional=True),
    'crop_scale': Key(
      tuple,
      (0.2, 1.0),
      'area of RandomResizedCrop; None: no crop',
      check=_AREA_RANGE,
      optional=True,
    ),
    'flip': Key(bool, True, 'mirror at random'),
    'dataset_size': Key(
      int,
      None,
      'the N that the source must have; None: what it has',
      check=_POSITIVE,
      optional=True,
    ),
    'workers': Key(int, 1, 'processes that load data; 0: none', check=_NOT_NEGATIVE, fixed=False),
    'worker_timeout_s': Key(
      float,
      data.WORKER_TIMEOUT_S,
      'a process that gives nothing for so many seconds has hung: the run ends; None: never',
      check=_POSITIVE,
      optional=True,
      fixed=False,
    ),
  },
  'privacy': {
    'adjacency': Key(str, 'zero_out', 'what neighbouring data sets are', ('zero_out',)),
    'clip_norm': Key(float, 1.0, 'C', check=_POSITIVE),
    'clipping': Key(
      str,
      'auto',
      'how per-example clipping is computed',
      ('auto', *privacy.CLIPPING_STRATEGIES),
    ),
    'check_clipping': Key(
      bool, True, 'compare it with vmap on synthetic examples at start', fixed=False
    ),
    'clip_function': Key(
      str,
      'clip',
      'clip: min(1, C / norm); automatic: C / (norm + gamma)',
      tuple(privacy.CLIP_FUNCTIONS),
    ),
    'gamma': Key(
      float,
      None,
      'of clip_function automatic; None: 0.01',
      check=_POSITIVE,
      optional=True,
    ),
    'mechanism': Key(str, 'gaussian', 'how noise is added', tuple(privacy.MECHANISMS)),
    'sampler': Key(str, 'poisson', 'how batches are drawn', tuple(privacy.SAMPLERS)),
    'truncated_batch_size': Key(
      int,
      None,
      'most that a draw of sampler truncated_poisson holds; None: 8 deviations above the mean',
      check=_POSITIVE,
      optional=True,
    ),
    'accountant': Key(str, 'pld', 'what epsilon is read by', tuple(privacy.ACCOUNTANTS)),
    'expected_batch_size': Key(int, 1024, 'mean size of a logical batch', check=_POSITIVE),
    'delta': Key(
      float, None, 'None: 1 / N', check=(lambda x: 0 < x < 1, 'above 0, below 1'), optional=True
    ),
    'epsilon': Key(
      float,
      None,
      'noise is calibrated to it; inf: a run without privacy',
      check=_POSITIVE,
      optional=True,
    ),
    'noise_multiplier': Key(float, None, 'sigma, in units of C', check=_POSITIVE, optional=True),
    'seed': Key(
      int,
      None,
      'fixed keys for tests, voids the guarantee; None: entropy',
      optional=True,
      check=_NOT_NEGATIVE,
    ),
  },
  'optimizer': {
    'name': Key(str, 'adamw', 'the optimizer', ('adamw',)),
    'learning_rate': Key(float, 5e-4, 'at its peak', check=_POSITIVE),
    'warmup_steps': Key(int, 0, 'linear, from 0', check=_NOT_NEGATIVE),
    'decay_steps': Key(
      int,
      None,
      'end of the cosine, warm-up counted in; None: train.steps',
      check=_POSITIVE,
      optional=True,
    ),
    'b1': Key(float, 0.9, 'decay of the first moment', check=_FRACTION),
    'b2': Key(float, 0.95, 'decay of the second moment', check=_FRACTION),
    'weight_decay': Key(
      float, 0.005, 'of matrices; biases and scales have none', check=_NOT_NEGATIVE
    ),
  },
  'mesh': {
    'physical_batch': Key(int, 16, 'examples at a time on a device', check=_POSITIVE, fixed=False),
    'batches_per_chunk': Key(
      int, 8, 'physical batches per transfer to the device', check=_POSITIVE, fixed=False
    ),
    'remat': Key(
      bool, False, 'compute the inside of blocks again in the backward pass', fixed=False
    ),
    'model_parallel': Key(
      int,
      1,
      'devices that share the parameters between them; 1: each has them all',
      check=_POSITIVE,
      fixed=False,
    ),
  },
  'train': {
    'steps': Key(int, 1000, 'logical batches', check=_POSITIVE),
    'model_seed': Key(int, 0, 'of the initial parameters; public', check=_NOT_NEGATIVE),
    'log_every': Key(int, 10, 'steps', check=_POSITIVE, fixed=False),
    'checkpoint_every': Key(int, 100, 'steps', check=_POSITIVE, fixed=False),
    'evaluate_at': Key(
      tuple,
      (),
      'steps after which `evals` are run; results go to evals/step_N',
      check=(lambda x: all(type(n) is int and n > 0 for n in x), 'positive whole numbers'),
      fixed=False,
    ),
    'keep_checkpoints': Key(int, 3, 'the latest ones', check=_POSITIVE, fixed=False),
    'diagnostics': Key(
      bool,
      True,
      'write losses, norms and counts: private, outside the guarantee',
      fixed=False,
    ),
  },
}

# The keys of a source beside its name.
SOURCES = {
  'scenes': {
    'split': Key(str, 'train', 'which scenes', ('train', 'validation', 'test')),
    'size': Key(int, 100_000, 'how many scenes', check=_POSITIVE),
    'label': Key(str, 'color', 'what the label tells', tuple(data.SCENE_LABELS)),
  },
  'tar_shards': {
    'path': Key(
      str,
      '',
      'folder, glob, brace range or URL of the tar shards, or a manifest of tools.index_shards',
      check=_GIVEN,
    ),
    'caption_key': Key(str, 'txt', "extension of the caption, or 'json:FIELD'"),
    'label_key': Key(str, None, 'field of the json with the label', optional=True),
    'index_dir': Key(
      str,
      None,
      'folder or URL where byte-offset indexes go; None: beside the shards',
      optional=True,
      fixed=False,
    ),
  },
  'image_folder': {
    'path': Key(str, '', 'folder of the splits, in them one of each class', check=_GIVEN),
    'split': Key(str, '', 'folder of the split', check=_GIVEN),
  },
  'tfds': {
    'dataset': Key(str, '', 'name[/config][:version], prepared as array_record', check=_GIVEN),
    'split': Key(str, 'train', 'split, in the TFDS slicing language'),
    'data_dir': Key(str, None, 'None: the TFDS default', optional=True),
    'image_key': Key(str, 'image', 'feature with the image'),
    'caption_key': Key(str, None, 'feature with the caption', optional=True),
    'label_key': Key(str, 'label', 'feature with the label', optional=True),
    'caption_template': Key(
      str, None, "caption made from the label, as 'a photo of a {}'", optional=True
    ),
  },
}


def base_config() -> ml_collections.ConfigDict:
  """A config with every section at its defaults; `data.source` and `evals` are empty."""
  config = ml_collections.ConfigDict({name: {} for name in SECTIONS})
  for name, keys in SECTIONS.items():
    config[name] = _defaults(keys)
  config.data.source = ml_collections.ConfigDict()
  config.evals = ml_collections.ConfigDict()
  config.checkpoint = config_dict.placeholder(str)
  return config


def source_config(name: str, **values) -> ml_collections.ConfigDict:
  """A source at its defaults but for `values`.

  Raises:
    UserError: for an unknown source or key.
  """
  return _with_values('source', name, SOURCES, values)


def dataset_config(dataset: str, split: str, **values) -> ml_collections.ConfigDict:
  """The source section of a data set of the catalogue (`data.DATASETS`).

  Args:
    dataset: its name.
    split: 'train' or 'test'; where the real test labels are not public, test is the validation split.
    values: further keys of the source, such as data_dir (TFDS) or path (image folders).

  Raises:
    UserError: for an unknown data set, split or key.
  """
  found = data.find_dataset(dataset)
  own_split = choose(f'split of {dataset}', split, found.splits)
  return source_config(**found.source | {'split': own_split} | values)


def evaluator_config(name: str, **values) -> ml_collections.ConfigDict:
  """An entry of `evals` at its defaults but for `values`.

  Raises:
    UserError: for an unknown evaluator or key.
  """
  return _with_values('evaluator', name, EVALUATORS, values)


def probes_beside_baselines(train, test) -> ml_collections.ConfigDict:
  """Entries of `evals`: linear probes of the model, of the model untrained, and of raw pixels.

  Args:
    train: the source that probes are fitted to.
    test: the source that they are judged on.
  """
  subjects = {'private_features': 'model', 'untrained_encoder': 'untrained', 'raw_pixels': 'pixels'}
  return ml_collections.ConfigDict(
    {
      name: evaluator_config('linear_probe', train=train, test=test, features=features)
      for name, features in subjects.items()
    }
  )


def choose(what: str, value: str, variants: dict[str, Any]) -> Any:
  """The variant that a config file's argument names.

  Raises:
    UserError: if there is no such variant.
  """
  if value not in variants:
    raise UserError(f'{what} is {value!r}; allowed: {", ".join(variants)}')
  return variants[value]


def _with_values(what, name, table, values):
  config = _defaults(choose(what, name, table))
  for key, value in values.items():
    if key not in config:
      raise UserError(_unknown_key(f'{what} {name}: {key}', key, config))
    config[key] = copy.deepcopy(value)  # sections that share one would change together
  config.name = name
  return config


def _defaults(keys: dict[str, Key]) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  for name, key in keys.items():
    if isinstance(key, Key) and key.optional:
      config[name] = config_dict.placeholder(key.kind)
      if key.default is not None:
        config[name] = key.default
    elif isinstance(key, Key):
      config[name] = key.default
    else:
      config[name] = ml_collections.ConfigDict()
  return config


_COUNTS = (
  lambda x: bool(x) and all(type(n) is int and n > 0 for n in x),
  'one or more whole numbers above 0',
)
_TEMPLATES = (
  lambda x: bool(x) and all(isinstance(t, str) and t.count('{}') == 1 for t in x),
  'one or more texts that hold {} once',
)

EVALUATORS = {
  'linear_probe': {
    'train': SOURCES,
    'test': SOURCES,
    'features': Key(str, 'model', 'what is probed', evals.FEATURES),
    'batch_size': Key(int, 256, 'images at a time', check=_POSITIVE),
  },
  'linear_probe_sgd': {
    'train': SOURCES,
    'test': SOURCES,
    'optimizer': Key(str, 'lars', 'momentum 0.9, no weight decay', evals.PROBE_OPTIMIZERS),
    'epochs': Key(int, 90, 'passes over the training images', check=_POSITIVE),
    'warmup_epochs': Key(int, 10, 'of these', check=_NOT_NEGATIVE),
    'base_learning_rates': Key(
      tuple,
      (0.1,),
      'times probe_batch_size / 256; of several the best on a fifth of the training images',
      check=(
        lambda x: bool(x) and all(isinstance(r, (int, float)) and r > 0 for r in x),
        'one or more numbers above 0',
      ),
    ),
    'probe_batch_size': Key(int, 16_384, 'images of a step', check=_POSITIVE),
    'augment': Key(bool, True, 'random crops and flips in every epoch'),
    'batch_size': Key(int, 256, 'images at a time in the encoder', check=_POSITIVE),
  },
  'fine_tune': {
    'train': SOURCES,
    'test': SOURCES,
    'epochs': Key(int, 100, 'passes over the training images', check=_POSITIVE),
    'warmup_epochs': Key(int, 5, 'of these', check=_NOT_NEGATIVE),
    'base_learning_rate': Key(float, 5e-4, 'times train_batch_size / 256', check=_POSITIVE),
    'layer_decay': Key(
      float,
      0.65,
      "a layer's learning rate over that of the layer above",
      check=(lambda x: 0 < x <= 1, 'above 0, at most 1'),
    ),
    'weight_decay': Key(float, 0.05, 'of matrices', check=_NOT_NEGATIVE),
    'label_smoothing': Key(float, 0.1, 'share that all classes have alike', check=_FRACTION),
    'train_batch_size': Key(int, 1024, 'images of a step', check=_POSITIVE),
    'batch_size': Key(int, 64, 'images at a time', check=_POSITIVE),
  },
  'private_probe': {
    'train': SOURCES,
    'test': SOURCES,
    'features': Key(str, 'model', 'what is probed', evals.FEATURES),
    'epsilon': Key(float, 1.0, 'of the probe, for its training images', check=_POSITIVE),
    'delta': Key(float, None, 'None: 1 / N', check=_FRACTION, optional=True),
    'clip_norm': Key(float, 1.0, "of an example's gradient", check=_POSITIVE),
    'expected_batch_size': Key(int, 1024, 'Poisson-sampled', check=_POSITIVE),
    'steps': Key(int, 200, 'noisy gradients', check=_POSITIVE),
    'learning_rate': Key(float, 4.0, 'at the start; falls to zero as a cosine', check=_POSITIVE),
    'batch_size': Key(int, 256, 'images at a time', check=_POSITIVE),
  },
  'few_shot': {
    'train': SOURCES,
    'test': SOURCES,
    'features': Key(str, 'model', 'what is probed', evals.FEATURES),
    'shots': Key(tuple, (1, 2, 5, 10), 'images per class', check=_COUNTS),
    'draws': Key(int, 5, 'how many times the images are drawn', check=_POSITIVE),
    'batch_size': Key(int, 256, 'images at a time', check=_POSITIVE),
  },
  'knn': {
    'train': SOURCES,
    'test': SOURCES,
    'features': Key(str, 'model', 'what is compared', evals.FEATURES),
    'k': Key(int, 20, 'how many neighbours vote', check=_POSITIVE),
    'batch_size': Key(int, 256, 'images at a time', check=_POSITIVE),
  },
  'retrieval': {
    'source': SOURCES,
    'features': Key(str, 'model', 'what is compared', evals.FEATURES),
    'at': Key(tuple, (1, 5, 10), 'numbers of neighbours', check=_COUNTS),
    'batch_size': Key(int, 256, 'images at a time', check=_POSITIVE),
  },
  'captions': {
    'source': SOURCES,
    'images': Key(
      int, 24, 'how many held-out images to caption; None: all', check=_POSITIVE, optional=True
    ),
    'batch_size': Key(int, 32, 'images at a time', check=_POSITIVE),
    'max_tokens': Key(
      int,
      None,
      'of a caption, [CLS] and [SEP] included; None: data.text_length',
      check=(lambda x: x > 1, 'above 1'),
      optional=True,
    ),
    'method': Key(str, 'greedy', 'how captions are written', tuple(evals.CAPTION_METHODS)),
    'beams': Key(int, None, 'of method beam; None: 4', check=_POSITIVE, optional=True),
    'length_penalty': Key(
      float,
      None,
      'of method beam: log probability / tokens^length_penalty is compared; None: 1',
      check=_NOT_NEGATIVE,
      optional=True,
    ),
    'top_p': Key(
      float,
      None,
      'of method nucleus: how much of the probability is drawn from; None: 0.9',
      check=(lambda x: 0 < x <= 1, 'above 0, at most 1'),
      optional=True,
    ),
    'temperature': Key(float, None, 'of method nucleus; None: 1', check=_POSITIVE, optional=True),
    'seed': Key(int, None, 'of method nucleus; None: 0', check=_NOT_NEGATIVE, optional=True),
  },
  'zero_shot': {
    'source': SOURCES,
    'method': Key(
      str,
      'likelihood',
      'likelihood: lowest mean token loss; greedy: descent in the tree of the labels',
      evals.ZERO_SHOT_METHODS,
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
      check=_TEMPLATES,
      optional=True,
    ),
    'labels_file': Key(
      str,
      None,
      "a class a line, synonyms parted by commas; None: the source's class names",
      optional=True,
    ),
    'batch_size': Key(int, 32, 'images at a time', check=_POSITIVE),
  },
  'aro_scenes': {
    'source': {'scenes': SOURCES['scenes']},
    'test': Key(str, 'attributes', 'how false captions are made', evals.ARO_SCENES_TESTS),
    'batch_size': Key(int, 64, 'cases at a time', check=_POSITIVE),
  },
  'aro_order': {
    'annotations': Key(str, '', 'a list of {image, caption: [...]} as JSON', check=_GIVEN),
    'images': Key(str, '', 'folder of the images', check=_GIVEN),
    'batch_size': Key(int, 64, 'cases at a time', check=_POSITIVE),
  },
  'aro_visual_genome': {
    'annotations': Key(
      str, '', 'visual_genome_relation.json or visual_genome_attribution.json', check=_GIVEN
    ),
    'images': Key(str, '', 'folder of the images', check=_GIVEN),
    'batch_size': Key(int, 64, 'cases at a time', check=_POSITIVE),
  },
}


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that does not fit the schema.

  Raises:
    UserError: naming the key, its value and what is allowed.
  """
  tree = config.to_dict()
  _check_names(tree, [*SECTIONS, 'evals', 'checkpoint'], '')
  for section, keys in SECTIONS.items():
    extra = ['source'] if section == 'data' else []
    _check_section(tree.get(section), keys, section, extra)
  _check_named(tree['data']['source'], SOURCES, 'data.source', 'name')
  for name, entry in tree['evals'].items():
    _check_named(entry, EVALUATORS, f'evals.{name}', 'name')
    if entry['name'] == 'captions':
      _check_caption_method(name, entry)
  p = tree['privacy']
  if (p['epsilon'] is None) == (p['noise_multiplier'] is None):
    raise UserError(
      f'privacy.epsilon is {p["epsilon"]} and privacy.noise_multiplier is'
      f' {p["noise_multiplier"]}; give exactly one of them, and None for the other'
    )
  if p['epsilon'] != math.inf and p['mechanism'] == 'none':
    raise UserError("privacy.mechanism is 'none'; it is allowed with privacy.epsilon=inf only")
  if p['gamma'] is not None and p['clip_function'] != 'automatic':
    raise UserError(
      f"privacy.gamma is {p['gamma']}; it goes with privacy.clip_function='automatic' only"
    )
  o = tree['optimizer']
  if o['warmup_steps'] >= (o['decay_steps'] or tree['train']['steps']):
    raise UserError(
      f'optimizer.warmup_steps is {o["warmup_steps"]}; it must be below decay_steps'
      f' ({o["decay_steps"]}), which is train.steps ({tree["train"]["steps"]}) where None'
    )
  t = tree['train']
  for step in t['evaluate_at']:
    if step > t['steps']:
      raise UserError(
        f'train.evaluate_at holds {step}; steps must not exceed train.steps, {t["steps"]}'
      )
  if t['evaluate_at'] and not tree['evals']:
    raise UserError('train.evaluate_at is set, but the config has no evals')
  size, patch = tree['data']['image_size'], tree['model']['patch_size']
  patch = patch or models.SIZES[tree['model']['size']].patch_size
  if size % patch:
    raise UserError(f'data.image_size is {size}; it must be a multiple of the patch size, {patch}')


def _check_caption_method(name, entry):
  """Every option belongs to the method."""
  for method, options in evals.CAPTION_METHODS.items():
    for key in options:
      if entry[key] is not None and method != entry['method']:
        raise UserError(
          f'evals.{name}.{key} is {entry[key]!r}; it goes with method {method!r} only, this one is'
          f' {entry["method"]!r}'
        )


def _check_named(tree, table, path, key):
  """Checks a section whose keys depend on its name."""
  if not isinstance(tree, dict) or tree.get(key) not in table:
    found = tree.get(key) if isinstance(tree, dict) else tree
    raise UserError(f'{path}.{key} is {found!r}; allowed: {", ".join(table)}')
  _check_section(tree, table[tree[key]], path, [key])


def _check_section(tree, keys, path, extra):
  if not isinstance(tree, dict):
    raise UserError(f'{path} is {tree!r}; it must be a section with {", ".join(keys)}')
  _check_names(tree, [*keys, *extra], f'{path}.')
  for name, key in keys.items():
    if isinstance(key, Key):
      _check_value(tree[name], key, f'{path}.{name}')
    else:
      _check_named(tree[name], key, f'{path}.{name}', 'name')


def _check_names(tree, allowed, prefix):
  for name in tree:
    if name not in allowed:
      raise UserError(_unknown_key(f'{prefix}{name}', name, allowed))
  for name in allowed:
    if name not in tree:
      raise UserError(f'{prefix}{name} is missing from the config')


def _unknown_key(path, name, allowed):
  close = difflib.get_close_matches(name, list(allowed), 1)
  hint = f' (did you mean {close[0]}?)' if close else ''
  return f'{path} is no key of the config{hint}; allowed: {", ".join(allowed)}'


def _check_value(value, key: Key, path):
  if value is None:
    if not key.optional:
      raise UserError(f'{path} is None; it must be a value of type {key.kind.__name__}')
    return
  kinds = {float: (int, float), tuple: (tuple, list)}.get(key.kind, (key.kind,))
  if not isinstance(value, kinds) or (isinstance(value, bool) and key.kind is not bool):
    raise UserError(f'{path} is {value!r}; it must be of type {key.kind.__name__}')
  if key.allowed is not None and value not in key.allowed:
    raise UserError(f'{path} is {value!r}; allowed: {", ".join(map(str, key.allowed))}')
  if key.check is not None:
    holds, description = key.check
    # A NaN fails every comparison, and so every check.
    try:
      held = holds(value)
    except TypeError:
      held = False
    if not held:
      raise UserError(f'{path} is {value!r}; it must be {description}')


def to_json(config: ml_collections.ConfigDict) -> str:
  """The config as it is written to config.json."""
  return json.dumps(config.to_dict(), indent=2, default=list)


def fixed_part(config_json: str) -> dict:
  """The keys, as 'section.key' -> value, that a run must keep when it resumes."""
  tree = json.loads(config_json)
  fixed = {
    f'{section}.{name}': tree[section].get(name)
    for section, keys in SECTIONS.items()
    for name, key in keys.items()
    if key.fixed
  }
  source = tree['data']['source']
  fixed |= {
    f'data.source.{name}': value
    for name, value in source.items()
    if name == 'name' or SOURCES[source['name']][name].fixed
  }
  return fixed
