"""The names of facebookresearch/ViP-MAE, which are those of facebookresearch/mae."""

from dpcap.errors import UserError
from dpcap.models.mae import MAE
from dpcap.models.reference_names.names import TOKEN, TOKENS, Names, patch_layout


def mae_names(model: MAE) -> Names:
  """The names of its arrays.

  Raises:
    UserError: if its encoder is not that of ViP.
  """
  if model.encoder_of != 'vip':
    raise UserError(f"encoder_of={model.encoder_of!r}: the reference's MAE has encoder_of='vip'")
  names = Names()
  names.trained |= {
    'cls_token': (('encoder', 'class_token'), TOKEN),
    'mask_token': (('decoder', 'mask_token'), TOKEN),
  }
  if model.train_positions:
    names.trained |= {
      'pos_embed': (('encoder', 'positions'), TOKENS),
      'decoder_pos_embed': (('decoder', 'positions'), TOKENS),
    }
  else:
    names.positions |= {
      'pos_embed': (True, model.width),
      'decoder_pos_embed': (True, model.decoder_width),
    }
  names.add_dense(
    'patch_embed.proj', 'encoder', 'patch_projection', kernel=patch_layout(model.patch_size)
  )
  for i in range(model.depth):
    names.add_encoder_block(f'blocks.{i}', 'encoder', f'block_{i}', qkv_bias=True)
  names.add_norm('norm', 'encoder', 'norm')
  names.add_dense('decoder_embed', 'decoder', 'embedding')
  for i in range(model.decoder_depth):
    names.add_encoder_block(f'decoder_blocks.{i}', 'decoder', f'block_{i}', qkv_bias=True)
  names.add_norm('decoder_norm', 'decoder', 'norm')
  names.add_dense('decoder_pred', 'decoder', 'pixels')
  return names
