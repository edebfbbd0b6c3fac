"""What the features are worth: evaluators, each a function behind one config entry.

An evaluator takes a Subject and its own options and returns a Result; EVALUATORS lists them.
"""

from dpcap.evals import (
  accuracy,
  aro,
  captions,
  few_shot,
  fine_tune,
  knn,
  linear_probe,
  linear_probe_sgd,
  private_probe,
  retrieval,
  zero_shot,
)
from dpcap.evals.aro import SCENES_TESTS as ARO_SCENES_TESTS
from dpcap.evals.decoding import METHODS as CAPTION_METHODS
from dpcap.evals.features import FEATURES
from dpcap.evals.features import choose as choose_features
from dpcap.evals.linear_probe_sgd import OPTIMIZERS as PROBE_OPTIMIZERS
from dpcap.evals.subject import Result, Subject
from dpcap.evals.zero_shot import METHODS as ZERO_SHOT_METHODS

# name in the config -> function(subject, **options) -> Result
EVALUATORS = {
  'accuracy': accuracy.evaluate,
  'linear_probe': linear_probe.evaluate,
  'linear_probe_sgd': linear_probe_sgd.evaluate,
  'fine_tune': fine_tune.evaluate,
  'private_probe': private_probe.evaluate,
  'few_shot': few_shot.evaluate,
  'knn': knn.evaluate,
  'retrieval': retrieval.evaluate,
  'captions': captions.evaluate,
  'zero_shot': zero_shot.evaluate,
  'aro_scenes': aro.evaluate_scenes,
  'aro_order': aro.evaluate_order,
  'aro_visual_genome': aro.evaluate_visual_genome,
}

# What an evaluator calls of the model beside its features.
NEEDS = {
  'accuracy': 'logits',
  'fine_tune': 'FEATURE_PARTS',
  'captions': 'start',
  'zero_shot': 'text_loss',
  'aro_scenes': 'text_loss',
  'aro_order': 'text_loss',
  'aro_visual_genome': 'text_loss',
}

__all__ = [
  'ARO_SCENES_TESTS',
  'CAPTION_METHODS',
  'EVALUATORS',
  'FEATURES',
  'NEEDS',
  'PROBE_OPTIMIZERS',
  'Result',
  'Subject',
  'ZERO_SHOT_METHODS',
  'choose_features',
]
