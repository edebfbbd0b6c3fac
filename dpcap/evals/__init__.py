"""What the features are worth: evaluators, each a function behind one config entry.

An evaluator takes a Subject and its own options and returns a Result; EVALUATORS lists them.
"""

from dpcap.evals import captions, linear_probe
from dpcap.evals.features import FEATURES
from dpcap.evals.subject import Result, Subject

# name in the config -> function(subject, **options) -> Result
EVALUATORS = {'linear_probe': linear_probe.evaluate, 'captions': captions.evaluate}

__all__ = ['EVALUATORS', 'FEATURES', 'Result', 'Subject']
