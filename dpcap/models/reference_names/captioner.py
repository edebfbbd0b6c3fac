"""The names of facebookresearch/dpcap for the captioner."""

from dpcap.models.captioner import Captioner
from dpcap.models.reference_names.names import SAME, TOKEN, Names, patch_layout

# In every official checkpoint, but no output of DP-Cap depends on them: name -> (whether it has a
# row for each token of a text, the model's attribute that is its width).
UNUSED = {
  'text_pos_embed': (True, 'width'),
  'encoder_text_type_embedding': (False, 'width'),
  'mask_token': (False, 'decoder_width'),
  'mask_token_text': (False, 'decoder_width'),
}


def captioner_names(model: Captioner) -> Names:
  """The names of its arrays."""
  names = Names(unused={name: (rows, getattr(model, w)) for name, (rows, w) in UNUSED.items()})
  names.add_dense(
    'patch_embed.proj', 'encoder', 'patch_projection', kernel=patch_layout(model.patch_size)
  )
  for i in range(model.depth):
    names.add_encoder_block(f'blocks.{i}', 'encoder', f'block_{i}', qkv_bias=False)
  names.add_norm('norm', 'encoder', 'norm')

  names.add_dense('decoder_embed', 'memory_projection')
  embedding = ('decoder', 'token_embedding', 'embedding')
  names.trained['text_embedding_layer_SimVLM.weight'] = (embedding, SAME)
  for i in range(model.decoder_depth):
    name, path = f'decoder.layers.{i}', ('decoder', f'block_{i}')
    names.add_dense(f'{name}.self_attn.c_attn', *path, 'self_qkv', bias=False)
    names.add_dense(f'{name}.self_attn.c_proj', *path, 'self_out', bias=False)
    names.add_norm(f'{name}.norm1', *path, 'self_norm')
    names.add_dense(f'{name}.multihead_attn.q_proj', *path, 'cross_q', bias=False)
    names.add_dense(f'{name}.multihead_attn.kv_proj', *path, 'cross_kv', bias=False)
    names.add_dense(f'{name}.multihead_attn.c_proj', *path, 'cross_out', bias=False)
    names.add_norm(f'{name}.norm2', *path, 'cross_norm')
    names.add_dense(f'{name}.linear1', *path, 'mlp_in', bias=False)
    names.add_dense(f'{name}.linear2', *path, 'mlp_out', bias=False)
    names.add_norm(f'{name}.norm3', *path, 'mlp_norm')
  names.add_norm('decoder_pred_text.0', 'decoder', 'norm')
  names.add_dense('decoder_pred_text.1', 'decoder', 'logits')

  names.frozen |= {
    'cls_token': (('encoder', 'class_token'), TOKEN),
    'encoder_image_type_embedding': (('encoder', 'type_embedding'), TOKEN),
    'decoder_image_type_embedding': (('memory_type_embedding',), TOKEN),
    'decoder_text_type_embedding': (('decoder', 'type_embedding'), TOKEN),
  }
  names.positions |= {
    'pos_embed': (True, model.width),
    'decoder_pos_embed': (True, model.decoder_width),
    'text_decoder_pos_embed': (False, model.decoder_width),
  }
  return names
