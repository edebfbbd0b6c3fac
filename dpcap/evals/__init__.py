"""What the features are worth: evaluators, each a function behind one config entry.

An evaluator takes a Subject and its own options and returns a Result; EVALUATORS lists them.
"""

from dpcap.evals import (
  accuracy,
  aro,
  caption_retrieval,
  captions,
  few_shot,
  fine_tune,
  knn,
  linear_probe,
  linear_probe_sgd,
  nearest_class_mean,
  private_probe,
  retrieval,
  zero_shot,
)
from dpcap.evals.features import choose as choose_features
from dpcap.evals.subject import Result, Subject

# name in the config -> what it is
EVALUATORS = {
  'accuracy': accuracy.EVALUATOR,
  'linear_probe': linear_probe.EVALUATOR,
  'linear_probe_sgd': linear_probe_sgd.EVALUATOR,
  'fine_tune': fine_tune.EVALUATOR,
  'private_probe': private_probe.EVALUATOR,
  'few_shot': few_shot.EVALUATOR,
  'knn': knn.EVALUATOR,
  'nearest_class_mean': nearest_class_mean.EVALUATOR,
  'retrieval': retrieval.EVALUATOR,
  'captions': captions.EVALUATOR,
  'caption_retrieval': caption_retrieval.EVALUATOR,
  'zero_shot': zero_shot.EVALUATOR,
  'aro_scenes': aro.SCENES,
  'aro_order': aro.ORDER,
  'aro_visual_genome': aro.VISUAL_GENOME,
}

__all__ = ['EVALUATORS', 'Result', 'Subject', 'choose_features']
