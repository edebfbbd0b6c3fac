"""Configs: made from the schema, checked against it.

An experiment is a Python file whose `get_config` starts from `base_config()` and changes
what is its own. `validate` refuses what does not fit before anything starts. All keys are in
dpcap/schema.py.
"""

import copy
import difflib
import json
import math
from collections.abc import Collection
from typing import Any

import ml_collections
from ml_collections import config_dict

from dpcap import data, evals, models
from dpcap.errors import UserError
from dpcap.key import Key
from dpcap.schema import EVALUATORS, MODELS, SECTIONS, SOURCES
from dpcap.training.optimizer import OPTIMIZERS, SCHEDULES


def base_config() -> ml_collections.ConfigDict:
  """A config with every section at its defaults; `data.source` and `evals` are empty.

  Its model is the captioner.
  """
  config = ml_collections.ConfigDict({name: {} for name in ('model', *SECTIONS)})
  config.model = model_config('captioner')
  for name, keys in SECTIONS.items():
    config[name] = _defaults(keys)
  config.data.source = ml_collections.ConfigDict()
  config.evals = ml_collections.ConfigDict()
  config.checkpoint = config_dict.placeholder(str)
  return config


def model_config(name: str, **values) -> ml_collections.ConfigDict:
  """A model at its defaults but for `values`.

  Raises:
    UserError: for an unknown model or key.
  """
  return _with_values('model', name, MODELS, values)


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


def read_words(argument: str, *families: Collection[str]) -> list[str]:
  """One word of each family, as the argument of a config file names them.

  Args:
    argument: words parted by commas, in any order, at most one of a family; '' names none.
    families: their words, no word in two of them; the first stands where none is named.

  Returns:
    The words, in the order of the families.

  Raises:
    UserError: naming the word that no family has, or the two of one.
  """
  chosen = [None] * len(families)
  for word in filter(None, argument.split(',')):
    places = [i for i, family in enumerate(families) if word in family]
    if not places:
      allowed = '; '.join(', '.join(family) for family in families)
      raise UserError(f'{word!r} is no word of this config; allowed, one of each: {allowed}')
    if chosen[places[0]] is not None:
      raise UserError(f'{word!r} and {chosen[places[0]]!r} exclude each other; give one of them')
    chosen[places[0]] = word
  return [word or next(iter(family)) for word, family in zip(chosen, families)]


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


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that does not fit the schema.

  Raises:
    UserError: naming the key, its value and what is allowed.
  """
  tree = config.to_dict()
  _check_names(tree, ['model', *SECTIONS, 'evals', 'checkpoint'], '')
  _check_named(tree['model'], MODELS, 'model', 'name')
  for section, keys in SECTIONS.items():
    extra = ['source'] if section == 'data' else []
    _check_section(tree.get(section), keys, section, extra)
  _check_named(tree['data']['source'], SOURCES, 'data.source', 'name')
  for name, entry in tree['evals'].items():
    _check_named(entry, EVALUATORS, f'evals.{name}', 'name')
    evaluator = evals.EVALUATORS[entry['name']]
    need = evaluator.needs
    if need and not hasattr(models.MODELS[tree['model']['name']], need):
      able = [name for name, model in models.MODELS.items() if hasattr(model, need)]
      raise UserError(
        f'evals.{name}.name is {entry["name"]!r}, which asks the model for its {need}; it goes with'
        f' model.name {", ".join(able)}, this one is {tree["model"]["name"]!r}'
      )
    if 'layers' in entry:
      evals.choose_features(
        f'evals.{name}',
        models.MODELS[tree['model']['name']],
        entry.get('features', 'model'),
        entry['layers'],
      )
    for choice, variants in evaluator.variants.items():
      _check_options(entry, f'evals.{name}', choice, variants)
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
  _check_options(o, 'optimizer', 'name', OPTIMIZERS)
  _check_options(o, 'optimizer', 'schedule', SCHEDULES)
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
  if t['init'] is None and tuple(t['init_parts']) != ('all',):
    raise UserError(
      f'train.init_parts is {t["init_parts"]}; it goes with train.init, which is None'
    )
  if t['evaluate_at'] and not tree['evals']:
    raise UserError('train.evaluate_at is set, but the config has no evals')
  try:
    models.make_model(
      image_size=tree['data']['image_size'],
      vocab_size=1,
      remat=tree['mesh']['remat'],
      **tree['model'],
    )
  except UserError as e:
    raise UserError(f'the config of {tree["model"]["name"]}: {e}') from e


def _check_options(section, path, choice, variants):
  """Every option that is set belongs to the variant that the section's key `choice` names."""
  for variant, options in variants.items():
    for key in options:
      if section[key] is not None and variant != section[choice]:
        raise UserError(
          f'{path}.{key} is {section[key]!r}; it goes with {choice} {variant!r} only, this one is'
          f' {section[choice]!r}'
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
  for path, table, part in (
    ('model', MODELS, tree['model']),
    ('data.source', SOURCES, tree['data']['source']),
  ):
    fixed |= {
      f'{path}.{name}': value
      for name, value in part.items()
      if name == 'name' or table[part['name']][name].fixed
    }
  return fixed
