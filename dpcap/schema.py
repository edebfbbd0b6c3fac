"""The schema of a config: every key, its type, its default and what is allowed."""

from dpcap import data, evals, models, privacy
from dpcap.key import COUNTS, FRACTION, GIVEN, NOT_NEGATIVE, POSITIVE, Key
from dpcap.training.optimizer import OPTIMIZERS, SCHEDULES

_AREA_RANGE = (
  lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
  'two fractions of the area, 0 < smallest <= largest <= 1',
)
_JITTER = (
  lambda x: len(x) == 5 and min(x) >= 0 and x[3] <= 0.5 and x[4] <= 1,
  'five numbers from 0: three ranges of factors, turns of the hue to 0.5, a probability',
)

SECTIONS = {
  'data': {
    'image_size': Key(int, 224, 'side of the images, pixels', check=POSITIVE),
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
    'pad_crop': Key(
      int,
      None,
      'pixels by which the image is reflected at each side before its size is cut out at random',
      check=POSITIVE,
      optional=True,
    ),
    'flip': Key(bool, True, 'mirror at random'),
    'color_jitter': Key(
      tuple,
      None,
      'brightness, contrast, saturation, hue, and the probability of changing any',
      check=_JITTER,
      optional=True,
    ),
    'views': Key(
      int,
      1,
      'how many times a drawn record is augmented; the mean of its gradients is clipped',
      check=POSITIVE,
    ),
    'dataset_size': Key(
      int,
      None,
      'the N that the source must have; None: what it has',
      check=POSITIVE,
      optional=True,
    ),
    'workers': Key(int, 1, 'processes that load data; 0: none', check=NOT_NEGATIVE, fixed=False),
    'worker_timeout_s': Key(
      float,
      data.WORKER_TIMEOUT_S,
      'a process that gives nothing for so many seconds has hung: the run ends; None: never',
      check=POSITIVE,
      optional=True,
      fixed=False,
    ),
  },
  'privacy': {
    'adjacency': Key(str, 'zero_out', 'what neighbouring data sets are', ('zero_out',)),
    'clip_norm': Key(float, 1.0, 'C', check=POSITIVE),
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
      check=POSITIVE,
      optional=True,
    ),
    'mechanism': Key(str, 'gaussian', 'how noise is added', tuple(privacy.MECHANISMS)),
    'sampler': Key(str, 'poisson', 'how batches are drawn', tuple(privacy.SAMPLERS)),
    'truncated_batch_size': Key(
      int,
      None,
      'most that a draw of sampler truncated_poisson holds; None: 8 deviations above the mean',
      check=POSITIVE,
      optional=True,
    ),
    'accountant': Key(str, 'pld', 'what epsilon is read by', tuple(privacy.ACCOUNTANTS)),
    'expected_batch_size': Key(int, 1024, 'mean size of a logical batch', check=POSITIVE),
    'delta': Key(
      float, None, 'None: 1 / N', check=(lambda x: 0 < x < 1, 'above 0, below 1'), optional=True
    ),
    'epsilon': Key(
      float,
      None,
      'noise is calibrated to it; inf: a run without privacy',
      check=POSITIVE,
      optional=True,
    ),
    'noise_multiplier': Key(float, None, 'sigma, in units of C', check=POSITIVE, optional=True),
    'simulation_divisor': Key(
      int,
      None,
      'k: no run but its simulation, at batch and noise divided by k; None: the run itself',
      check=POSITIVE,
      optional=True,
    ),
    'seed': Key(
      int,
      None,
      'fixed keys for tests, voids the guarantee; None: entropy',
      optional=True,
      check=NOT_NEGATIVE,
    ),
  },
  'optimizer': {
    'name': Key(str, 'adamw', 'the optimizer', tuple(OPTIMIZERS)),
    'learning_rate': Key(float, 5e-4, 'at its peak', check=POSITIVE),
    'schedule': Key(str, 'cosine', 'of the learning rate, after the warm-up', tuple(SCHEDULES)),
    'warmup_steps': Key(int, 0, 'linear, from 0', check=NOT_NEGATIVE),
    'decay_steps': Key(
      int,
      None,
      'end of schedule cosine, warm-up counted in; None: train.steps',
      check=POSITIVE,
      optional=True,
    ),
    'b1': Key(
      float, None, 'of adamw: decay of the first moment; None: 0.9', check=FRACTION, optional=True
    ),
    'b2': Key(
      float, None, 'of adamw: decay of the second moment; None: 0.95', check=FRACTION, optional=True
    ),
    'momentum': Key(float, None, 'of sgd; None: 0', check=FRACTION, optional=True),
    'weight_decay': Key(
      float,
      None,
      'of matrices; biases and scales have none. None: 0.005 of adamw, 0 of sgd',
      check=NOT_NEGATIVE,
      optional=True,
    ),
  },
  'mesh': {
    'physical_batch': Key(int, 16, 'examples at a time on a device', check=POSITIVE, fixed=False),
    'batches_per_chunk': Key(
      int, 8, 'physical batches per transfer to the device', check=POSITIVE, fixed=False
    ),
    'remat': Key(
      bool, False, 'compute the inside of blocks again in the backward pass', fixed=False
    ),
    'model_parallel': Key(
      int,
      1,
      'devices that share the parameters between them; 1: each has them all',
      check=POSITIVE,
      fixed=False,
    ),
  },
  'train': {
    'steps': Key(int, 1000, 'logical batches', check=POSITIVE),
    'model_seed': Key(int, 0, 'of the initial parameters; public', check=NOT_NEGATIVE),
    'ema_decay': Key(
      float,
      None,
      'of an average of the parameters over the steps, which is then what checkpoints hold as the'
      ' model and what is evaluated; None: none',
      check=FRACTION,
      optional=True,
    ),
    'init': Key(
      str,
      None,
      'weights to start from: a checkpoint, a workdir (its newest checkpoint) or an official file'
      ' (.safetensors, .npz, .pth); None: from model_seed',
      check=GIVEN,
      optional=True,
    ),
    'init_parts': Key(
      tuple,
      ('all',),
      "what is taken from init: all, or top-level modules of the model, such as ('encoder',)",
      check=(
        lambda x: bool(x) and all(isinstance(name, str) for name in x),
        "('all',) or names of modules",
      ),
    ),
    'log_every': Key(int, 10, 'steps', check=POSITIVE, fixed=False),
    'checkpoint_every': Key(int, 100, 'steps', check=POSITIVE, fixed=False),
    'evaluate_at': Key(
      tuple,
      (),
      'steps after which `evals` are run; results go to evals/step_N',
      check=(lambda x: all(type(n) is int and n > 0 for n in x), 'positive whole numbers'),
      fixed=False,
    ),
    'keep_checkpoints': Key(int, 3, 'the latest ones', check=POSITIVE, fixed=False),
    'diagnostics': Key(
      bool,
      True,
      'write losses, norms and counts: private, outside the guarantee',
      fixed=False,
    ),
  },
}

# The keys of a model beside its name.
MODELS = {name: model.KEYS for name, model in models.MODELS.items()}

# The keys of a source beside its name.
SOURCES = {
  'scenes': {
    'split': Key(str, 'train', 'which scenes', ('train', 'validation', 'test')),
    'size': Key(int, 100_000, 'how many scenes', check=POSITIVE),
    'label': Key(str, 'color', 'what the label tells', tuple(data.SCENE_LABELS)),
  },
  'textures': {
    'split': Key(str, 'train', 'which textures', ('train', 'validation', 'test')),
    'size': Key(int, 1_000_000, 'how many textures', check=POSITIVE),
    'programs': Key(int, 21_000, 'how many programs they are of', check=POSITIVE),
  },
  'tar_shards': {
    'path': Key(
      str,
      '',
      'folder, glob, brace range or URL of the tar shards, or a manifest of tools.index_shards',
      check=GIVEN,
    ),
    'image_keys': Key(
      str,
      None,
      "extension of the image, all that follows the first dot; several as 'jpg,png'; None: the"
      ' usual ones',
      optional=True,
      check=GIVEN,
    ),
    'caption_key': Key(
      str, 'txt', "extension of the caption, or 'json:FIELD', which may be a list of captions"
    ),
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
    'path': Key(str, '', 'folder of the splits, in them one of each class', check=GIVEN),
    'split': Key(str, '', 'folder of the split', check=GIVEN),
  },
  'tfds': {
    'dataset': Key(str, '', 'name[/config][:version], prepared as array_record', check=GIVEN),
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

_TEMPLATES = (
  lambda x: bool(x) and all(isinstance(t, str) and t.count('{}') == 1 for t in x),
  'one or more texts that hold {} once',
)

# What evaluators of features share.
_PAIR = {'train': SOURCES, 'test': SOURCES}
_LAYERS = Key(
  str,
  None,
  "which of the model's features, as its class lists them under LAYERS; None: the first",
  optional=True,
)
_FEATURES = {
  'features': Key(str, 'model', 'what the features are of', evals.FEATURES),
  'layers': _LAYERS,
}
_BATCH_SIZE = Key(int, 256, 'images at a time', check=POSITIVE)

_OWN_KEYS = {
  'accuracy': {
    'source': SOURCES,
    'batch_size': _BATCH_SIZE,
  },
  'linear_probe': {
    **_PAIR,
    **_FEATURES,
    'batch_size': _BATCH_SIZE,
  },
  'linear_probe_sgd': {
    **_PAIR,
    'layers': _LAYERS,
    'optimizer': Key(str, 'lars', 'momentum 0.9, no weight decay', evals.PROBE_OPTIMIZERS),
    'epochs': Key(int, 90, 'passes over the training images', check=POSITIVE),
    'warmup_epochs': Key(int, 10, 'of these', check=NOT_NEGATIVE),
    'base_learning_rates': Key(
      tuple,
      (0.1,),
      'times probe_batch_size / 256; of several the best on a fifth of the training images',
      check=(
        lambda x: bool(x) and all(isinstance(r, (int, float)) and r > 0 for r in x),
        'one or more numbers above 0',
      ),
    ),
    'probe_batch_size': Key(int, 16_384, 'images of a step', check=POSITIVE),
    'augment': Key(bool, True, 'random crops and flips in every epoch'),
    'batch_size': Key(int, 256, 'images at a time in the encoder', check=POSITIVE),
  },
  'fine_tune': {
    **_PAIR,
    'epochs': Key(int, 100, 'passes over the training images', check=POSITIVE),
    'warmup_epochs': Key(int, 5, 'of these', check=NOT_NEGATIVE),
    'base_learning_rate': Key(float, 5e-4, 'times train_batch_size / 256', check=POSITIVE),
    'layer_decay': Key(
      float,
      0.65,
      "a layer's learning rate over that of the layer above",
      check=(lambda x: 0 < x <= 1, 'above 0, at most 1'),
    ),
    'weight_decay': Key(float, 0.05, 'of matrices', check=NOT_NEGATIVE),
    'label_smoothing': Key(float, 0.1, 'share that all classes have alike', check=FRACTION),
    'train_batch_size': Key(int, 1024, 'images of a step', check=POSITIVE),
    'batch_size': Key(int, 64, 'images at a time', check=POSITIVE),
  },
  'private_probe': {
    **_PAIR,
    **_FEATURES,
    'epsilon': Key(float, 1.0, 'of the probe, for its training images', check=POSITIVE),
    'delta': Key(float, None, 'None: 1 / N', check=FRACTION, optional=True),
    'clip_norm': Key(float, 1.0, "of an example's gradient", check=POSITIVE),
    'expected_batch_size': Key(int, 1024, 'Poisson-sampled', check=POSITIVE),
    'steps': Key(int, 200, 'noisy gradients', check=POSITIVE),
    'learning_rate': Key(float, 4.0, 'at the start; falls to zero as a cosine', check=POSITIVE),
    'batch_size': _BATCH_SIZE,
  },
  'few_shot': {
    **_PAIR,
    **_FEATURES,
    'shots': Key(tuple, (1, 2, 5, 10), 'images per class', check=COUNTS),
    'draws': Key(int, 5, 'how many times the images are drawn', check=POSITIVE),
    'batch_size': _BATCH_SIZE,
  },
  'knn': {
    **_PAIR,
    **_FEATURES,
    'k': Key(int, 20, 'how many neighbours vote', check=POSITIVE),
    'batch_size': _BATCH_SIZE,
  },
  'retrieval': {
    'source': SOURCES,
    **_FEATURES,
    'at': Key(tuple, (1, 5, 10), 'numbers of neighbours', check=COUNTS),
    'batch_size': _BATCH_SIZE,
  },
  'captions': {
    'source': SOURCES,
    'images': Key(
      int, 24, 'how many held-out images to caption; None: all', check=POSITIVE, optional=True
    ),
    'batch_size': Key(int, 32, 'images at a time', check=POSITIVE),
    'max_tokens': Key(
      int,
      None,
      'of a caption, [CLS] and [SEP] included; None: data.text_length',
      check=(lambda x: x > 1, 'above 1'),
      optional=True,
    ),
    'method': Key(str, 'greedy', 'how captions are written', tuple(evals.CAPTION_METHODS)),
    'beams': Key(int, None, 'of method beam; None: 4', check=POSITIVE, optional=True),
    'length_penalty': Key(
      float,
      None,
      'of method beam: log probability / tokens^length_penalty is compared; None: 1',
      check=NOT_NEGATIVE,
      optional=True,
    ),
    'top_p': Key(
      float,
      None,
      'of method nucleus: how much of the probability is drawn from; None: 0.9',
      check=(lambda x: 0 < x <= 1, 'above 0, at most 1'),
      optional=True,
    ),
    'temperature': Key(float, None, 'of method nucleus; None: 1', check=POSITIVE, optional=True),
    'seed': Key(int, None, 'of method nucleus; None: 0', check=NOT_NEGATIVE, optional=True),
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
    'batch_size': Key(int, 32, 'images at a time', check=POSITIVE),
  },
  'aro_scenes': {
    'source': {'scenes': SOURCES['scenes']},
    'test': Key(str, 'attributes', 'how false captions are made', evals.ARO_SCENES_TESTS),
    'batch_size': Key(int, 64, 'cases at a time', check=POSITIVE),
  },
  'aro_order': {
    'annotations': Key(str, '', 'a list of {image, caption: [...]} as JSON', check=GIVEN),
    'images': Key(str, '', 'folder of the images', check=GIVEN),
    'batch_size': Key(int, 64, 'cases at a time', check=POSITIVE),
  },
  'aro_visual_genome': {
    'annotations': Key(
      str, '', 'visual_genome_relation.json or visual_genome_attribution.json', check=GIVEN
    ),
    'images': Key(str, '', 'folder of the images', check=GIVEN),
    'batch_size': Key(int, 64, 'cases at a time', check=POSITIVE),
  },
}

# What every evaluator has besides its own keys.
EVALUATORS = {
  name: {
    **keys,
    'apart': Key(
      bool,
      None,
      'whether what it reads is apart from the training data, so that its result may be published.'
      ' None: as the records tell, and if they do not: private. True: you vouch that none of its'
      ' images is a training image under any name, size or encoding; it holds where records do not'
      ' tell, as of files of another kind. False: private',
      optional=True,
      fixed=False,
    ),
  }
  for name, keys in _OWN_KEYS.items()
}
