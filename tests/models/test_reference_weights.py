"""Importing the reference implementation's weights, and refusing what is not them."""

import pathlib

import jax
import numpy as np
import pytest

from dpcap.errors import UserError
from dpcap.models import MAE
from dpcap.models.positions import image_positions
from dpcap.models.reference_names.captioner import UNUSED
from dpcap.models.reference_weights import from_reference, to_reference
from tools.check_oracle import oracle_model, read_oracle

ORACLE = read_oracle(str(pathlib.Path(__file__).with_name('captioner_oracle.npz')))
ARRAYS = ORACLE.under('param/')
MODEL = oracle_model(ORACLE)
FROZEN = (
  *UNUSED,
  'cls_token',
  'pos_embed',
  'decoder_pos_embed',
  'text_decoder_pos_embed',
  'encoder_image_type_embedding',
  'decoder_image_type_embedding',
  'decoder_text_type_embedding',
)


@pytest.fixture(scope='module')
def variables():
  return from_reference(ARRAYS, MODEL)


def test_variables_are_what_init_returns(variables):
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((12, 12, 3)), np.zeros(7, int))
  signature = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert signature(variables) == signature(shapes)


def test_round_trip(variables):
  """Every trained array comes back exactly, under its name: no two of them are swapped."""
  arrays = to_reference(variables['params'], MODEL)
  assert arrays.keys() == ARRAYS.keys() - set(FROZEN)
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, ARRAYS[name], err_msg=name)


def test_patch_kernel_is_laid_out_row_column_channel(variables):
  torch_kernel = ARRAYS['patch_embed.proj.weight']  # out x 3 x p x p
  kernel = variables['params']['encoder']['patch_projection']['kernel']
  size, row, column, channel = MODEL.patch_size, 1, 2, 0
  np.testing.assert_array_equal(
    kernel[(row * size + column) * 3 + channel], torch_kernel[:, channel, row, column]
  )


def test_arrays_that_dpcap_never_uses_may_be_absent(variables):
  used = {name: x for name, x in ARRAYS.items() if name not in UNUSED}
  jax.tree.map(np.testing.assert_array_equal, from_reference(used, MODEL), variables)


@pytest.mark.parametrize(
  'name', ['blocks.0.attn.qkv.weight', 'cls_token', 'text_decoder_pos_embed']
)
def test_a_missing_array_is_named(name):
  with pytest.raises(UserError, match=f"'{name}' is missing"):
    from_reference({k: x for k, x in ARRAYS.items() if k != name}, MODEL)


def test_an_unknown_array_is_named():
  # Another depth is the likely cause: weights of a larger model must not load in part.
  with pytest.raises(UserError, match="unknown array 'blocks.1.norm1.weight'"):
    from_reference(ARRAYS | {'blocks.1.norm1.weight': np.ones(12)}, MODEL)


@pytest.mark.parametrize(
  'name, shape, needed',
  [
    ('decoder_embed.weight', (12, 8), r'\(8, 12\)'),
    ('patch_embed.proj.weight', (12, 3, 8, 2), r'\(12, 3, 4, 4\)'),
    ('patch_embed.proj.weight', (12, 48), r'\(12, 3, 4, 4\)'),
    ('cls_token', (12,), r'\(1, 1, 12\)'),
    ('norm.bias', (1, 12), r'\(12,\)'),
    ('pos_embed', (10, 12), r'\(1, tokens, 12\)'),
    ('pos_embed', (1, 11, 12), 'square'),
    ('pos_embed', (1, 0, 12), 'no tokens'),
    ('text_decoder_pos_embed', (1, 0, 8), 'no tokens'),
  ],
)
def test_an_array_of_another_shape_is_named(name, shape, needed):
  with pytest.raises(UserError, match=f"'{name}' has.*{needed}"):
    from_reference(ARRAYS | {name: np.zeros(shape, np.float32)}, MODEL)


@pytest.mark.parametrize('name', ['pos_embed', 'decoder_pos_embed', 'text_decoder_pos_embed'])
@pytest.mark.parametrize('offset', [1e-3, np.nan])
def test_positions_that_are_not_sin_cos_are_refused(name, offset):
  changed = ARRAYS[name].copy()
  changed[0, -1, 0] += offset
  with pytest.raises(UserError, match=f"'{name}' differs"):
    from_reference(ARRAYS | {name: changed}, MODEL)


def test_positions_of_another_text_length_are_accepted():
  """Weights serve any text length: only the values must be sin-cos."""
  name = 'text_decoder_pos_embed'
  from_reference(ARRAYS | {name: ARRAYS[name][:, :3]}, MODEL)


# --- The masked autoencoder.

TRAINED = MAE(4, 12, 1, 3, 8, 1, 2, train_positions=True)


@pytest.fixture(name='mae', scope='module')
def _mae():
  """Random variables of the model with trained positions, and the reference's arrays of them."""
  rng = np.random.default_rng(0)
  arguments = jax.random.key(0), np.zeros((12, 12, 3)), np.zeros(2, np.uint32)
  shapes = jax.eval_shape(TRAINED.init, *arguments)
  draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
  variables = jax.tree.map(draw, shapes)
  return variables, to_reference(variables['params'], TRAINED)


def test_an_mae_comes_back_as_it_went(mae):
  variables, arrays = mae
  jax.tree.map(np.testing.assert_array_equal, from_reference(arrays, TRAINED), variables)
  # One name stands for one array: no two are swapped.
  encoder, decoder = variables['params']['encoder'], variables['params']['decoder']
  for name, array in {
    'cls_token': encoder['class_token'][None, None],
    'mask_token': decoder['mask_token'][None, None],
    'pos_embed': encoder['positions'][None],
    'decoder_pos_embed': decoder['positions'][None],
    'norm.weight': encoder['norm']['scale'],
    'decoder_norm.bias': decoder['norm']['bias'],
    'blocks.0.attn.qkv.bias': encoder['block_0']['attention_qkv']['bias'],
    'decoder_blocks.0.mlp.fc2.weight': decoder['block_0']['mlp_out']['kernel'].T,
    'decoder_embed.weight': decoder['embedding']['kernel'].T,
    'decoder_pred.weight': decoder['pixels']['kernel'].T,
  }.items():
    np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_positions_of_an_mae_must_be_sin_cos_where_they_are_constants(mae):
  variables, arrays = mae
  fixed = TRAINED.clone(train_positions=False)
  with pytest.raises(UserError, match="'pos_embed' differs.*train_positions=True takes them"):
    from_reference(arrays, fixed)
  sincos = {
    'pos_embed': np.float32(image_positions(3, 3, 12)[None]),
    'decoder_pos_embed': np.float32(image_positions(3, 3, 8)[None]),
  }
  found = from_reference(arrays | sincos, fixed)
  assert 'positions' not in found['params']['encoder']
  np.testing.assert_array_equal(
    found['params']['decoder']['mask_token'], variables['params']['decoder']['mask_token']
  )
