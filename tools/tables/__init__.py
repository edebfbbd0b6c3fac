"""The tables of the study, a file each."""

from tools.tables import (
  batch,
  compositional,
  data,
  epsilon,
  few_shot,
  linear_probe,
  privacy,
  size,
  synthetic,
  zero_shot,
)

TABLES = {
  'privacy': privacy.TABLE,
  'linear_probe': linear_probe.TABLE,
  'few_shot': few_shot.TABLE,
  'zero_shot': zero_shot.TABLE,
  'compositional': compositional.TABLE,
  'epsilon': epsilon.TABLE,
  'batch': batch.TABLE,
  'data': data.TABLE,
  'size': size.TABLE,
  'synthetic': synthetic.TABLE,
}
