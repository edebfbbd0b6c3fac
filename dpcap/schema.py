"""The schema of a config: every key, its type, its default and what is allowed."""

from dpcap import data, evals, models, privacy
from dpcap.key import FRACTION, GIVEN, NOT_NEGATIVE, POSITIVE, Key
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
SOURCES = {name: source.KEYS for name, source in data.SOURCES.items()}

# What every evaluator has besides its own keys.
EVALUATORS = {
  name: {
    **evaluator.keys,
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
  for name, evaluator in evals.EVALUATORS.items()
}
