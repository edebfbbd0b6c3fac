"""From a validated config to the parts of a run."""

import flax.linen as nn
import ml_collections
import numpy as np
from absl import logging

from dpcap import data, models, privacy
from dpcap.errors import UserError
from dpcap.training import noise_cache


def make_tokenizer(config: ml_collections.ConfigDict) -> data.Tokenizer:
  """The tokenizer of `config.data`."""
  return data.make_tokenizer(config.data.tokenizer, config.data.vocabulary)


def make_model(config: ml_collections.ConfigDict, vocab_size: int) -> nn.Module:
  """The model of `config.model`, not initialised.

  Raises:
    UserError: if its keys do not belong together.
  """
  return models.make_model(
    image_size=config.data.image_size,
    vocab_size=vocab_size,
    remat=config.mesh.remat,
    **config.model,
  )


def make_source(config: ml_collections.ConfigDict, source: ml_collections.ConfigDict):
  """The source that a section such as `config.data.source` describes.

  Raises:
    UserError: if it refuses its files, or has not the size that the config says.
  """
  return data.make_source(image_size=config.data.image_size, **source)


def make_training_source(config: ml_collections.ConfigDict) -> data.Source:
  """`config.data.source`, of exactly `config.data.dataset_size` records where that is set.

  A few of its records are looked at; what they lack is said on the screen only.

  Raises:
    UserError: as make_source; if the sizes differ: N is part of the guarantee; if the model has
      other classes; or if none of the records that were looked at can be used.
  """
  source = make_source(config, config.data.source)
  declared = config.data.dataset_size
  if declared is not None and declared != len(source):
    raise UserError(
      f'data.dataset_size is {declared}, but the source {config.data.source.name!r} has'
      f' {len(source)} records; set it to that number, or to None'
    )
  fields = models.MODELS[config.model.name].INPUTS
  if 'label' in fields and config.model.classes != len(source.class_names):
    raise UserError(
      f'model.classes is {config.model.classes}, but the source {config.data.source.name!r} has'
      f' {len(source.class_names)} classes; set it to that number'
    )
  try:
    look = data.look_at(source, fields)
  except data.StoreError as e:
    raise UserError(f'{e.filename}: {e.strerror}') from e
  if 2 * look.usable < look.looked_at:
    said = (
      f'data.source: {look.usable} of {look.looked_at} records, spread over all {len(source):,},'
      f' can be used; the others: {"; ".join(look.reasons)}'
    )
    # Sources of many files say what is in them.
    about = getattr(source, 'about', '')
    said += f' ({about})' if about else ''
    if not look.usable:
      raise UserError(said)
    logging.warning('%s', said)
  return source


def make_plan(config: ml_collections.ConfigDict, dataset_size: int) -> privacy.PrivacyPlan:
  """The privacy parameters of the run: epsilon turned into noise, or noise given; or a simulation.

  Raises:
    UserError: if they do not belong together, or no noise meets epsilon.
  """
  p = config.privacy
  common = dict(
    dataset_size=dataset_size,
    expected_batch_size=p.expected_batch_size,
    steps=config.train.steps,
    delta=1 / dataset_size if p.delta is None else p.delta,
    clip_norm=p.clip_norm,
    mechanism=p.mechanism,
    sampler=p.sampler,
    accountant=p.accountant,
    truncated_batch_size=p.truncated_batch_size,
  )
  try:
    if p.epsilon is not None:
      plan = noise_cache.calibrate(epsilon=p.epsilon, **common)
    else:
      plan = privacy.PrivacyPlan(noise_multiplier=p.noise_multiplier, **common)
    return plan if p.simulation_divisor is None else plan.simulation(p.simulation_divisor)
  except ValueError as e:
    raise UserError(f'config.privacy: {e}') from e


def make_clip_function(config: ml_collections.ConfigDict) -> privacy.ClipFunction:
  """The clip function of `config.privacy`."""
  settings = {} if config.privacy.gamma is None else {'gamma': config.privacy.gamma}
  return privacy.CLIP_FUNCTIONS[config.privacy.clip_function](**settings)


def make_transform(
  config: ml_collections.ConfigDict, tokenizer: data.Tokenizer | None
) -> data.Transform:
  """What makes examples for the config's model; without a tokenizer, what tells their shapes."""
  return data.Transform(
    config.data.image_size,
    config.data.text_length,
    tokenizer,
    config.data.crop_scale,
    config.data.pad_crop,
    config.data.flip,
    config.data.color_jitter,
    fields=models.MODELS[config.model.name].INPUTS,
    views=config.data.views,
  )


def make_view(config: ml_collections.ConfigDict, tokenizer: data.Tokenizer) -> data.Transform:
  """What makes the views that evaluations take."""
  return data.Transform(config.data.image_size, config.data.text_length, tokenizer)


def synthetic_examples(
  config: ml_collections.ConfigDict, vocab_size: int, count: int
) -> data.Example:
  """Random examples (count, ...) with the shapes and ranges of real ones, from no data."""
  rng = np.random.default_rng(0)
  below = {
    'image': 256,
    'tokens': vocab_size,
    'label': config.model.get('classes', 1),
    'key': 2**32,
  }
  examples = {
    name: rng.integers(0, below[name], (count, *field.shape), dtype=field.dtype)
    for name, field in make_transform(config, tokenizer=None).shapes.items()
  }
  if 'tokens' in examples:
    examples['tokens'][..., config.data.text_length // 2 + 1 :] = models.PADDING
  return examples
