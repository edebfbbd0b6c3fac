"""ARO: does the captioner tell the true caption from false ones of the same words?"""

from tools.reproduce_parts.captioners import table_of_captioners

_SCENES = {'aro_relations': 'relations', 'aro_attributes': 'attributes', 'aro_order': 'order'}
_PAPER = {
  'aro_relation': 'relation',
  'aro_attribution': 'attribution',
  'aro_coco_order': 'coco order',
  'aro_flickr30k_order': 'flickr30k order',
}

TABLE = table_of_captioners(
  'Compositional understanding (ARO)', {'paper': _PAPER, 'cpu': _SCENES, 'smoke': _SCENES}
)
