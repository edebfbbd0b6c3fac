"""What a file of reference weights is for, told from its names and shapes."""

import types

import jax
import numpy as np
import pytest

from dpcap import models
from dpcap.errors import UserError
from dpcap.models import official, reference_weights
from dpcap.models.reference_names.captioner import UNUSED
from dpcap.models.sizes import SIZES
from dpcap.models.weight_files import save_weights

IMAGE, TEXT, VOCABULARY = 16, 7, 25
KEYS = {'name': 'captioner', 'size': 'micro', 'patch_size': None, 'dtype': 'float32'}


def drawn(model, *inputs):
  """Variables of a model, no two arrays of which are alike."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  return {'frozen': {}} | jax.tree.map(draw, shapes)


@pytest.fixture(name='variables', scope='module')
def _variables():
  model = models.make_model(**KEYS, image_size=IMAGE, vocab_size=VOCABULARY)
  return drawn(model, np.zeros((IMAGE, IMAGE, 3)), np.zeros(TEXT, int))


@pytest.fixture(name='arrays', scope='module')
def _arrays(variables):
  return official.to_official(variables, KEYS, IMAGE, TEXT)


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_exact(tmp_path, variables, arrays):
  path = tmp_path / 'x.safetensors'
  save_weights(path, arrays)
  read = official.read_official(path)
  _same(read.variables, variables)
  assert read.description == official.Description(
    {'name': 'captioner', 'size': 'micro', 'patch_size': None}, IMAGE, TEXT, VOCABULARY
  )
  assert read.claims is None and read.name == 'x.safetensors'


def test_what_is_exported_is_all_that_the_reference_has(arrays):
  # Names of the state dict beside those of blocks.
  names = {
    'cls_token': (1, 1, 16),
    'pos_embed': (1, 5, 16),
    'text_pos_embed': (1, 7, 16),
    'mask_token': (1, 1, 16),
    'mask_token_text': (1, 1, 16),
    'decoder_pos_embed': (1, 5, 16),
    'text_decoder_pos_embed': (1, 7, 16),
    'encoder_image_type_embedding': (1, 1, 16),
    'encoder_text_type_embedding': (1, 1, 16),
    'decoder_image_type_embedding': (1, 1, 16),
    'decoder_text_type_embedding': (1, 1, 16),
    'patch_embed.proj.weight': (16, 3, 8, 8),
    'patch_embed.proj.bias': (16,),
    'text_embedding_layer_SimVLM.weight': (25, 16),
    'norm.weight': (16,),
    'norm.bias': (16,),
    'decoder_embed.weight': (16, 16),
    'decoder_embed.bias': (16,),
    'decoder_pred_text.0.weight': (16,),
    'decoder_pred_text.0.bias': (16,),
    'decoder_pred_text.1.weight': (25, 16),
    'decoder_pred_text.1.bias': (25,),
  }
  found = {n: x.shape for n, x in arrays.items() if not n.startswith(('blocks.', 'decoder.layers'))}
  assert found == names
  assert all(x.dtype == np.float32 for x in arrays.values())
  for name in UNUSED:
    assert not arrays[name].any()


@pytest.mark.parametrize('size, count', [('nano', 20_906_106), ('large', 407_807_802)])
def test_as_many_numbers_are_exported_as_the_reference_has(size, count):
  """Sander et al.'s models count so many, frozen ones included, at text length 40."""
  model = models.make_model('captioner', size=size, image_size=224, vocab_size=30_522)
  inputs = np.zeros((224, 224, 3)), np.zeros(40, int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  variables = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
  arrays = reference_weights.state_dict(variables, model, 224, 40)
  assert sum(x.size for x in arrays.values()) == count


def test_a_checkpoint_of_another_model_is_not_exported(variables):
  for keys in (KEYS | {'size': 'demo'}, KEYS | {'patch_size': 4}):
    with pytest.raises(UserError, match='the reference has no such weights'):
      official.to_official(variables, keys, IMAGE, TEXT)
  more = {**variables['params'], 'more': np.zeros(3, np.float32)}
  with pytest.raises(UserError, match='the reference has no such weights'):
    official.to_official(variables | {'params': more}, KEYS, IMAGE, TEXT)
  with pytest.raises(UserError, match="'classifier'; the reference has captioner"):
    official.to_official(variables, KEYS | {'name': 'classifier'}, IMAGE, TEXT)


def _shapes(arrays, **changed):
  shapes = {name: x.shape for name, x in arrays.items()} | changed
  return {n: types.SimpleNamespace(shape=s) for n, s in shapes.items() if s is not None}


@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('text_length', [40, 77])
def test_every_size_and_text_length_is_told_from_shapes(name, text_length):
  """The shapes are those of the reference, told apart from how ours come out."""
  size = SIZES[name]
  shapes = {
    'patch_embed.proj.weight': (size.width, 3, 16, 16),
    'decoder_embed.weight': (size.decoder_width, size.width),
    'text_embedding_layer_SimVLM.weight': (30_522, size.decoder_width),
    'pos_embed': (1, 197, size.width),
    'text_decoder_pos_embed': (1, text_length, size.decoder_width),
    **{f'blocks.{i}.norm1.bias': (size.width,) for i in range(size.depth)},
    **{f'decoder.layers.{i}.norm1.bias': (size.decoder_width,) for i in range(size.decoder_depth)},
  }
  described = official.KINDS['captioner'].describe(_shapes({}, **shapes))
  patch_size = None if size.patch_size == 16 else 16
  assert described == official.Description(
    {'name': 'captioner', 'size': name, 'patch_size': patch_size}, 224, text_length, 30_522
  )


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'text_embedding_layer_SimVLM.weight': None}, 'of no known model'),
    ({'pos_embed': None}, "'pos_embed' is missing"),
    ({'pos_embed': (1, 4, 16)}, "'pos_embed' has 4 tokens"),
    ({'pos_embed': (1, 1, 16)}, "'pos_embed' has 1 tokens"),
    ({'decoder_embed.weight': (16,)}, r"'decoder_embed.weight' has shape \(16,\); .* 2 axes"),
    ({'blocks.7.norm1.bias': (16,)}, r'of no known size \(width 16, depth 2, .*allowed: micro, d'),
    ({'patch_embed.proj.weight': (16, 3, 0, 0)}, 'patches have 0 pixels'),
  ],
)
def test_what_shapes_do_not_fit_is_named(arrays, changed, message):
  shapes = _shapes(arrays, **changed)
  with pytest.raises(UserError, match=message):
    official.find_kind(shapes).describe(shapes)


def test_nothing_is_read_that_the_model_does_not_have(tmp_path, arrays, monkeypatch):
  """An array that is larger than it should be, or unknown, stays on disk."""
  path = tmp_path / 'x.npz'
  for change in ({'norm.bias': np.zeros(10_000)}, {'more': np.zeros(3)}):
    np.savez(path, **(arrays | change))
    name = next(iter(change))

    def read(file, allow_pickle):
      array = np.lib.format.read_array(file, allow_pickle=allow_pickle)
      assert array.size not in (3, 10_000)
      return array

    namespace = types.SimpleNamespace(**vars(np.lib.format) | {'read_array': read})
    monkeypatch.setattr('dpcap.models.weight_files.npy', namespace)
    with pytest.raises(UserError, match=repr(name)):
      official.read_official(path)


def test_a_known_name_has_its_publishers_claims(tmp_path, arrays):
  path = tmp_path / 'base-eps7.safetensors'
  save_weights(path, arrays)
  assert 'epsilon about 7' in official.read_official(path).claims


MAE_KEYS = {
  'name': 'mae',
  'size': 'micro',
  'patch_size': 4,
  'decoder_width': 32,
  'decoder_depth': 2,
  'decoder_heads': 16,
  'encoder_of': 'vip',
}


@pytest.mark.parametrize('trained', [False, True])
def test_a_masked_autoencoder_goes_there_and_back(tmp_path, trained):
  """Whether its positions were trained is seen by what they are."""
  keys = MAE_KEYS | {'train_positions': trained}
  model = models.make_model(**keys, image_size=IMAGE, vocab_size=1)
  variables = drawn(model, np.zeros((IMAGE, IMAGE, 3)), np.zeros(2, np.uint32))
  # As its config has them; the loss has no part in the file.
  arrays = official.to_official(variables, keys | {'mask_ratio': 0.5}, IMAGE, TEXT)
  assert arrays['pos_embed'].shape == (1, 17, 16)
  assert arrays['decoder_pos_embed'].shape == (1, 17, 32)
  save_weights(tmp_path / 'x.safetensors', arrays)
  read = official.read_official(tmp_path / 'x.safetensors')
  _same(read.variables, variables)
  assert read.description == official.Description(keys, IMAGE, None, None)


def test_a_captioners_encoder_in_a_masked_autoencoder_is_not_the_references():
  keys = MAE_KEYS | {'encoder_of': 'captioner', 'train_positions': False}
  model = models.make_model(**keys, image_size=IMAGE, vocab_size=1)
  variables = drawn(model, np.zeros((IMAGE, IMAGE, 3)), np.zeros(2, np.uint32))
  with pytest.raises(UserError, match="encoder_of='captioner': the reference's MAE"):
    official.to_official(variables, keys, IMAGE, TEXT)


def test_of_two_models_none_is_taken(arrays):
  shapes = _shapes(arrays, **{'decoder_pred.weight': (192, 16)})
  with pytest.raises(UserError, match='of no known model; one of these must be there'):
    official.find_kind(shapes)


def test_positions_are_not_computed_without_bound(arrays):
  for name in ('pos_embed', 'text_decoder_pos_embed'):
    shapes = _shapes(arrays, **{name: (1, 1 + 300**2, 16)})
    with pytest.raises(UserError, match=f"'{name}' has 90,001 tokens; at most 65,536"):
      official.find_kind(shapes).describe(shapes)
