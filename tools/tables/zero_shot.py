"""The captioner as a classifier: the label with the lowest mean token loss."""

from tools.reproduce_parts.captioners import table_of_captioners

_SCENES = {'color_zero_shot': 'color'}
_PAPER = {f'{dataset}_zero_shot': dataset for dataset in ('imagenet', 'cifar10', 'cifar100')}

TABLE = table_of_captioners(
  'Zero-shot classification', {'paper': _PAPER, 'cpu': _SCENES, 'smoke': _SCENES}
)
