"""The catalogue: every entry makes a valid source section, and names become readable."""

import pytest

from dpcap import config as config_lib
from dpcap import data
from dpcap.errors import UserError


@pytest.mark.parametrize('dataset', data.DATASETS)
def test_entries_are_sections_that_a_config_takes(dataset):
  config = config_lib.base_config()
  config.data.source = config_lib.source_config('scenes')
  config.privacy.epsilon = 8.0
  where = {} if data.find_dataset(dataset).source['name'] == 'tfds' else {'path': '/images'}
  train, test = (config_lib.dataset_config(dataset, split, **where) for split in ('train', 'test'))
  assert train.split != test.split
  config.evals.probe = config_lib.evaluator_config('linear_probe', train=train, test=test)
  config.evals.zero = config_lib.evaluator_config('zero_shot', source=test, dataset=dataset)
  config_lib.validate(config)
  templates = data.find_dataset(dataset).templates
  assert templates[0].startswith('this is a photo of a {}')
  assert all(template.count('{}') == 1 for template in templates)


@pytest.mark.parametrize(
  'dataset, name, readable',
  [
    ('sun397', '/a/airplane_cabin', 'airplane cabin'),
    ('places365', 'apartment_building/outdoor', 'apartment building outdoor'),
    ('caltech101', 'faces_easy', 'close-up of a face'),
    ('caltech101', 'gerenuk', 'gerenuk'),
    ('cub200', '001.Black_footed_Albatross', 'Black footed Albatross'),
    ('pets', 'Maine_Coon', 'Maine Coon'),
    ('cars', 'Acura TL Type-S 2008', 'Acura TL Type-S 2008'),
    ('inaturalist2021', '00000_Animalia_Annelida_Lumbricus_terrestris', 'Lumbricus terrestris'),
  ],
)
def test_names_become_readable(dataset, name, readable):
  assert data.readable(data.find_dataset(dataset), [name]) == (readable,)


def test_what_is_not_there_is_refused():
  with pytest.raises(UserError, match="dataset is 'mnist'; allowed: aircraft, "):
    data.find_dataset('mnist')
  with pytest.raises(UserError, match="split of dtd is 'valid'; allowed: train, test"):
    config_lib.dataset_config('dtd', 'valid')
