"""A tiny captioner with random weights, as evaluators are given one."""

import jax
import numpy as np
import pytest

from dpcap import data, evals, models


@pytest.fixture(name='subject', scope='package')
def _subject():
  tokenizer = data.make_tokenizer('wordpiece', data.SCENES_VOCABULARY)
  model = models.make_model(
    'captioner', size='micro', image_size=16, vocab_size=tokenizer.vocab_size
  )
  image = np.zeros((16, 16, 3), np.float32)
  keys = {'params': jax.random.key(0), 'frozen': jax.random.key(1)}
  variables = jax.jit(model.init)(keys, image, np.ones(6, np.int32))
  return evals.Subject(
    model,
    variables,
    variables,
    data.Transform(16, 24, tokenizer),
    lambda section: data.Scenes(image_size=16, **section),
    note=lambda source: None,
    workers=0,
  )
