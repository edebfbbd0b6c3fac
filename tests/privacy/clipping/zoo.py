"""Small models as their authors would write them, for tests of per-example clipping.

`ZOO` maps a name to a function that builds a Model. Widths, lengths and vocabularies are
tiny, and no two axes that could be confused have the same size where that is possible.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dpcap import models

PyTree = Any


class Model(NamedTuple):
  """A loss to clip, and what to call it with.

  Attributes:
    loss_fn: `loss_fn(params, example) -> scalar`; computes in the dtype of `params`.
    params: numpy arrays, float64.
    make_batch: `make_batch(rng, size)` gives a batch of arrays; floats are float64.
    fallback: paths of the parameters whose whole per-example gradient is needed.
    may_fall_back: paths of those for which a strategy may or may not need it.
  """

  loss_fn: Callable[[PyTree, PyTree], jax.Array]
  params: PyTree
  make_batch: Callable[[np.random.Generator, int], PyTree]
  fallback: tuple[str, ...] = ()
  may_fall_back: tuple[str, ...] = ()


ZOO: dict[str, Callable[[], Model]] = {}


def entry(build):
  """Adds `build() -> Model` to the zoo; it is built once."""
  ZOO[build.__name__] = functools.cache(build)
  return build


def draw(shapes, seed: str):
  """Normal float64 arrays for a pytree of shapes (tuples of int) or of shaped things."""
  rng = np.random.default_rng(zlib.crc32(seed.encode()))
  is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
  shape_of = lambda x: x if is_shape(x) else x.shape
  return jax.tree.map(lambda x: 0.5 * rng.normal(size=shape_of(x)), shapes, is_leaf=is_shape)


def ids(high: int, *shape: int, low: int = 0):
  """An input of random integers in [low, high)."""
  return lambda rng, size: rng.integers(low, high, size=(size, *shape)).astype(np.int32)


def flags(*shape: int):
  """An input of random bools."""
  return lambda rng, size: rng.random(size=(size, *shape)) < 0.5


def positive(*shape: int):
  """An input of random floats in [0.1, 1)."""
  return lambda rng, size: rng.uniform(0.1, 1, size=(size, *shape))


def batch_maker(inputs: dict[str, Any]):
  """Input name -> shape of an example (normal floats), or a function of (rng, size)."""

  def make_batch(rng, size):
    normal = lambda shape: rng.normal(size=(size, *shape))
    return {
      name: kind(rng, size) if callable(kind) else normal(kind) for name, kind in inputs.items()
    }

  return make_batch


def one(make_batch):
  """An example as a model meets it while it is initialised: float32, no batch axis."""
  cast = lambda x: x[0].astype(np.float32) if x.dtype == np.float64 else x[0]
  return jax.tree.map(cast, make_batch(np.random.default_rng(0), 1))


def plain(forward, params, *, fallback=(), may_fall_back=(), **inputs) -> Model:
  """Mean squared error of `forward(params, **inputs)` to a random target.

  Args:
    forward: takes the parameters and the inputs of one example by name.
    params: numpy arrays, or shapes to draw them for.
    **inputs: as in `batch_maker`.
  """
  if not all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
    params = draw(params, seed=forward.__qualname__)
  example = one(batch_maker(inputs))
  params32 = jax.tree.map(np.float32, params)
  out = jax.eval_shape(lambda p, x: forward(p, **x), params32, example)

  def loss_fn(params, example):
    inputs = dict(example)
    target = inputs.pop('target')
    return jnp.mean(jnp.square(forward(params, **inputs) - target))

  make_batch = batch_maker({**inputs, 'target': out.shape})
  return Model(loss_fn, params, make_batch, tuple(fallback), tuple(may_fall_back))


def linen(module: nn.Module, *, fallback=(), may_fall_back=(), **inputs) -> Model:
  """A module called with the inputs, in order; the rest as for `plain`."""
  call = lambda inputs_by_name: [inputs_by_name[name] for name in inputs]
  example = one(batch_maker(inputs))
  shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), *call(x)), example)
  params = draw(shapes['params'], seed=type(module).__qualname__)
  forward = lambda params, **x: module.apply({'params': params}, *call(x))
  return plain(forward, params, fallback=fallback, may_fall_back=may_fall_back, **inputs)


# --- Dense layers and other products with a weight.


@entry
def mlp():
  """No token axis at all."""
  return linen(
    nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(5, use_bias=False), nn.gelu, nn.Dense(3)]),
    x=(4,),
  )


@entry
def dense_on_tokens():
  return linen(
    nn.Sequential([nn.Dense(7), nn.silu, nn.Dense(4, use_bias=False), nn.silu, nn.Dense(5)]),
    x=(3, 6),
  )


@entry
def dense_on_many_axes():
  return linen(nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(2)]), x=(2, 3, 2, 4))


@entry
def dense_general():
  class DenseGeneral(nn.Module):
    @nn.compact
    def __call__(self, x_TxD):
      x_TxHxC = jnp.tanh(nn.DenseGeneral((2, 3))(x_TxD))
      y_TxD = jnp.tanh(nn.DenseGeneral(4, axis=(-2, -1))(x_TxHxC))
      z_CxE = jnp.tanh(nn.DenseGeneral(6, axis=(0, 1))(x_TxHxC.transpose(0, 1, 2)))
      x_HxTxC = x_TxHxC.transpose(1, 0, 2)
      w_HxTxE = nn.DenseGeneral(4, axis=-1, batch_dims=(0,))(x_HxTxC)
      return y_TxD.sum(0) + w_HxTxE.sum((0, 1)) + z_CxE.mean()

  return linen(DenseGeneral(), x=(5, 4))


@entry
def self_attention():
  class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x_TxD):
      mask = nn.make_causal_mask(jnp.ones(x_TxD.shape[0]))
      x_TxD = x_TxD + nn.MultiHeadDotProductAttention(2, qkv_features=6)(x_TxD, mask=mask)
      return nn.MultiHeadDotProductAttention(1, qkv_features=3, use_bias=False)(x_TxD)

  return linen(SelfAttention(), x=(5, 4))


@entry
def cross_attention():
  class CrossAttention(nn.Module):
    @nn.compact
    def __call__(self, x_TxD, memory_SxD):
      return nn.MultiHeadDotProductAttention(2, qkv_features=4, out_features=5)(x_TxD, memory_SxD)

  return linen(CrossAttention(), x=(3, 5), memory=(4, 6))


@entry
def weights_with_head_axes():
  def forward(p, x):
    y = jnp.tanh(jnp.einsum('thi,hij->thj', x, p['kept']))
    z = jnp.tanh(jnp.einsum('thi,hij->htj', y, p['moved']))
    return jnp.einsum('hti,hio->to', z, p['summed'])

  shapes = {'kept': (2, 4, 3), 'moved': (2, 3, 5), 'summed': (2, 5, 6)}
  return plain(forward, shapes, x=(3, 2, 4))


@entry
def weight_on_the_left():
  def forward(p, x, y):
    x = jnp.tanh(jnp.einsum('ij,tj->ti', p['a'], x))
    x = jnp.tanh(p['b'] @ x)  # mixes tokens
    return p['c'] @ x.mean(0) + p['d'] @ y

  return plain(forward, {'a': (5, 4), 'b': (2, 3), 'c': (6, 5), 'd': (6, 7)}, x=(3, 4), y=(7,))


@entry
def bilinear():
  def forward(p, x, y):
    return jnp.einsum('ti,ijk,tk->tj', x, p['three'], y) + (x @ p['two']) * y.sum()

  return plain(forward, {'three': (3, 5, 2), 'two': (3, 5)}, x=(4, 3), y=(4, 2))


@entry
def products_of_every_orientation():
  """Contracted axes in any order, on either side, of a parameter with its axes in any order."""

  def forward(p, x):
    x_TxAxB = x
    return sum(
      jnp.tanh(jnp.einsum(equation, *operands)).sum()
      for equation, *operands in [
        ('tab,abo->to', x_TxAxB, p['a']),
        ('tab,oba->to', x_TxAxB, p['b']),
        ('boa,tab->to', p['c'].transpose(2, 0, 1), x_TxAxB),
        ('aob,tba->ot', p['d'], x_TxAxB.swapaxes(1, 2)),
        ('tab,bta->b', x_TxAxB, p['e']),
        ('ub,tab->tau', p['square'], x_TxAxB),
        ('bu,tab->uat', p['square'], x_TxAxB),
      ]
    )

  shapes = {
    'a': (3, 4, 5),
    'b': (5, 4, 3),
    'c': (5, 3, 4),
    'd': (3, 5, 4),
    'e': (4, 2, 3),
    'square': (4, 4),  # a wrong turn would go unnoticed by shapes
  }
  return plain(forward, shapes, x=(2, 3, 4))


@entry
def weight_batched_over_tokens():
  """One weight matrix per position: nothing is shared between tokens."""

  def forward(p, x):
    return jnp.tanh(jnp.einsum('ti,tij->tj', x, p['w'])) @ p['v']

  return plain(forward, {'w': (3, 4, 5), 'v': (5, 2)}, x=(3, 4))


@entry
def constant_output_gradient():
  """A loss linear in the product: its output gradients are the same for every example."""
  make_batch = batch_maker({'x': (3, 4), 'y': ()})
  loss_fn = lambda p, e: jnp.sum(e['x'] @ p['w'] + p['b']) + e['y'] * jnp.sum(p['b'])
  return Model(loss_fn, draw({'w': (4, 2), 'b': (2,)}, 'constant'), make_batch)


@entry
def constant_input():
  """Products whose input no example changes, and a parameter nothing else is added to."""

  def forward(p, x):
    positions = jnp.linspace(-1, 1, 12).reshape(4, 3)
    y = jnp.tanh(positions @ p['w'] + p['b'])  # the same for every example
    return (y * x) @ p['v'] + jnp.ones(5) @ p['u']

  return plain(
    forward,
    {'w': (3, 5), 'b': (5,), 'v': (5, 2), 'u': (5, 2)},
    may_fall_back=('w', 'b', 'u'),
    x=(4, 5),
  )


@entry
def inputs_of_every_type():
  """Integers, bools, scalars, a nested batch."""

  def loss_fn(p, example):
    count, (flag, scale), image = example
    x = (image / 128 - 1).astype(p['w'].dtype).reshape(4) @ p['w']
    x = jnp.where(flag, x, -x) * scale + count * p['b']
    x = jnp.concatenate([x, scale[None] @ p['row'][None], (count > 2) * p['c']])
    return jnp.sum(jnp.square(x - 1))

  def make_batch(rng, size):
    flag, scale = rng.random(size) < 0.5, rng.normal(size=size)
    count = rng.integers(6, size=size).astype(np.int8)
    return count, (flag, scale), rng.integers(256, size=(size, 2, 2)).astype(np.uint8)

  return Model(loss_fn, draw({'w': (4, 3), 'b': (3,), 'row': (2,), 'c': (2,)}, 'i'), make_batch)


@entry
def bare_arrays():
  """Parameters and examples need not be dictionaries."""
  loss_fn = lambda p, x: jnp.square(x @ p[0] + p[1][0]).sum() + x[0] * p[2]
  params = tuple(draw([(3, 2), (2,), ()], 'bare'))
  return Model(loss_fn, (params[0], [params[1]], params[2]), lambda rng, n: rng.normal(size=(n, 3)))


# --- Convolutions.


@entry
def conv_1d():
  return linen(
    nn.Sequential(
      [
        nn.Conv(4, (3,)),
        nn.gelu,
        nn.Conv(3, (3,), padding='VALID', strides=2),
        nn.gelu,
        nn.Conv(5, (2,), padding='CAUSAL', use_bias=False),
      ]
    ),
    x=(8, 2),
  )


@entry
def conv_2d():
  return linen(
    nn.Sequential(
      [
        nn.Conv(3, (3, 2), strides=(2, 1), padding=((1, 0), (0, 2))),
        nn.relu,
        lambda x: nn.max_pool(x, (2, 1)),
        nn.Conv(4, (2, 2), padding='SAME'),
        lambda x: nn.avg_pool(nn.silu(x), (1, 2), strides=(1, 2)),
      ]
    ),
    x=(7, 6, 2),
  )


@entry
def conv_dilated():
  return linen(
    nn.Sequential(
      [
        nn.Conv(3, (2, 3), kernel_dilation=(2, 1), padding='CIRCULAR'),
        nn.tanh,
        nn.Conv(2, (3, 2), input_dilation=(1, 2), kernel_dilation=2, padding=1),
      ]
    ),
    x=(5, 4, 2),
  )


@entry
def conv_grouped():
  return linen(
    nn.Sequential(
      [
        nn.Conv(6, (3, 2), feature_group_count=2),
        nn.tanh,
        nn.Conv(6, (2, 2), feature_group_count=6, strides=2, use_bias=False),
        nn.tanh,
        nn.Conv(12, (1, 2), feature_group_count=6, padding='VALID'),
      ]
    ),
    x=(5, 4, 4),
  )


@entry
def conv_transpose():
  return linen(
    nn.Sequential(
      [
        nn.ConvTranspose(3, (3, 2), strides=(2, 1)),
        nn.tanh,
        nn.ConvTranspose(2, (2, 2), padding='VALID', transpose_kernel=True, use_bias=False),
      ]
    ),
    may_fall_back=('layers_2/kernel',),
    x=(3, 4, 2),
  )


@entry
def conv_on_large_images():
  """More positions than a kernel has entries; then patches, fewer than entries."""
  return linen(
    nn.Sequential([nn.Conv(2, (3, 3)), nn.tanh, nn.Conv(8, (6, 6), (6, 6), padding='VALID')]),
    x=(12, 12, 3),
  )


@entry
def conv_on_frames():
  """Further leading axes of one example, which are a batch to the convolution."""
  return linen(nn.Sequential([nn.Conv(3, (2, 2)), nn.tanh, nn.Conv(2, (3, 3))]), x=(2, 3, 4, 3, 2))


@entry
def conv_3d_and_local():
  return linen(
    nn.Sequential(
      [nn.Conv(2, (2, 2, 2)), nn.tanh, lambda x: x.reshape(4, 6, 2), nn.ConvLocal(3, (2, 2))]
    ),
    x=(2, 4, 3, 2),
  )


@entry
def conv_channels_first():
  def forward(p, x):
    x = x[None]
    x = lax.conv(x, p['a'], (1, 1), 'SAME')
    x = lax.conv_general_dilated(
      jnp.tanh(x), p['b'].transpose(3, 2, 0, 1), (1, 2), 'VALID', rhs_dilation=(2, 1)
    )
    return x[0]

  return plain(forward, {'a': (3, 2, 2, 3), 'b': (2, 2, 3, 4)}, x=(2, 5, 6))


# --- Embeddings.

VOCAB = 5


@entry
def embedding():
  """Tokens repeat; padding tokens carry no loss, but are embedded."""

  class Embedding(nn.Module):
    @nn.compact
    def __call__(self, tokens_T, scale_T):
      x_TxD = nn.Embed(VOCAB, 4)(tokens_T) * scale_T[:, None]
      x_TxD = nn.Dense(3)(jnp.tanh(x_TxD + jnp.cumsum(x_TxD, 0)))
      return jnp.sum(x_TxD, 0, where=(tokens_T != 0)[:, None])

  return linen(Embedding(), tokens=ids(VOCAB, 6), scale=(6,))


@entry
def lookups():
  """Every way to look rows up, with ids past the ends."""

  def forward(p, near, far, pair, word, x):
    rows = [
      p['plain'][near],
      p['plain'][far],  # the default of indexing: clipped backward and forward
      jnp.take(p['clip'], far, axis=0, mode='clip'),
      jnp.take(p['wrap'], far, axis=0, mode='wrap'),
      jnp.take(p['fill'], far, axis=0, mode='fill', fill_value=0.0),
      p['plain'].at[near].get(mode='promise_in_bounds'),
      p['columns'][:, near].T,
      p['pairs'][pair].reshape(6, 4),
      jnp.broadcast_to(jnp.take(p['one'], word, axis=0), (6, 4)),
      jax.vmap(lambda table, i: table[i])(p['stack'], near[None])[0],  # as a vmapped layer does
    ]
    return jnp.tanh(sum((i + 1) * r for i, r in enumerate(rows)) * x)

  shapes = {
    'plain': (VOCAB, 4),
    'clip': (VOCAB, 4),
    'wrap': (VOCAB, 4),
    'fill': (VOCAB, 4),
    'columns': (4, VOCAB),
    'pairs': (VOCAB, 4),
    'one': (VOCAB, 4),
    'stack': (1, VOCAB, 4),
  }
  return plain(
    forward,
    shapes,
    fallback=('stack',),
    near=ids(VOCAB, 6),
    far=ids(2 * VOCAB, 6, low=-2 * VOCAB),
    pair=ids(VOCAB, 2, 3),
    word=ids(VOCAB),
    x=(6, 4),
  )


@entry
def lookup_past_the_end_is_nan():
  """`take` fills with NaN by default: the loss is NaN, the gradient is zero where it is."""
  forward = lambda p, tokens, x: jnp.take(p['e'], tokens, axis=0) * x
  return plain(forward, {'e': (VOCAB, 4)}, tokens=ids(VOCAB + 1, 2), x=(2, 4))


@entry
def one_hot():
  def forward(p, tokens):
    return jnp.tanh(jax.nn.one_hot(tokens, VOCAB, dtype=p['e'].dtype) @ p['e']) @ p['w']

  return plain(forward, {'e': (VOCAB, 4), 'w': (4, 3)}, tokens=ids(VOCAB, 6))


@entry
def tied_embedding():
  class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, tokens_T):
      embed = nn.Embed(VOCAB, 4)
      return embed.attend(jnp.tanh(nn.Dense(4)(embed(tokens_T))))

  return linen(TiedEmbedding(), tokens=ids(VOCAB, 6))


@entry
def tied_language_model():
  """Next-token cross-entropy with one matrix at both ends, and position rows of a table."""

  def loss_fn(p, example):
    tokens = example['tokens']
    x = p['e'][tokens[:-1]] * 4**0.5 + p['positions'][: len(tokens) - 1]
    x = jnp.tanh(x @ p['w']) * example['scale'] + x
    logits = x @ p['e'].T + p['e'] @ p['w'].mean(0)
    losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[1:, None], -1)[:, 0]
    return jnp.sum(losses, where=tokens[1:] != 0) / jnp.maximum(jnp.sum(tokens[1:] != 0), 1)

  params = draw({'e': (VOCAB, 4), 'positions': (8, 4), 'w': (4, 4)}, 'tied_language_model')
  return Model(
    loss_fn,
    params,
    batch_maker({'tokens': ids(VOCAB, 6), 'scale': (4,)}),
    may_fall_back=('e', 'w'),
  )


@entry
def indexed_tables():
  """Rows of a table chosen by constants (relative positions), and by a dynamic slice."""

  def forward(p, x, start):
    relative_TxT = jnp.arange(4)[:, None] - jnp.arange(4)[None, :] + 3
    scores_TxT = x @ x.T + p['relative'][relative_TxT]
    x = jax.nn.softmax(scores_TxT) @ x
    window = lax.dynamic_slice_in_dim(p['dynamic'], start, 4)
    return x * window + lax.dynamic_index_in_dim(p['dynamic'], start, keepdims=False)

  return plain(
    forward,
    {'relative': (7,), 'dynamic': (8, 3)},
    may_fall_back=('dynamic',),
    x=(4, 3),
    start=ids(4),
  )


# --- One parameter used at several places.


@entry
def shared_layers():
  """One Dense on two inputs of different lengths, and again deeper."""

  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x_TxD, y_SxD, z_D):
      dense = nn.Dense(4)
      x_TxD = jnp.tanh(dense(jnp.tanh(dense(x_TxD))))
      conv = nn.Conv(4, (2,))
      return dense(x_TxD).mean(0) + dense(y_SxD).sum(0) + dense(z_D) + conv(conv(x_TxD)).sum(0)

  return linen(Shared(), x=(3, 4), y=(5, 4), z=(4,))


@entry
def weights_used_in_different_ways():
  """A product and its transpose, a product and a sum, a product and a look-up."""

  def forward(p, x, tokens):
    y = jnp.tanh(x @ p['a']) @ p['a'].T  # an autoencoder
    y = jnp.tanh(y @ p['b']) @ p['b'] + p['b'][0]
    y = y + p['c'][:3] @ p['c'][tokens].mean(0) + x * p['c'][:3]
    return y + jnp.tanh(x.reshape(1, 9) @ p['c'].reshape(-1)[:9, None])

  shapes = {'a': (3, 5), 'b': (3, 3), 'c': (4, 3)}
  return plain(forward, shapes, may_fall_back=('a', 'b', 'c'), x=(3, 3), tokens=ids(4, 6))


@entry
def gradient_inside_the_loss():
  """A penalty on the gradient by the input: the backward pass is part of the model."""

  def loss_fn(p, example):
    energy = lambda x: jnp.sum(jnp.tanh(x @ p['w'] + p['b']) @ p['v'])
    value, slope = jax.value_and_grad(energy)(example['x'])
    return jnp.square(value - 1) + jnp.sum(jnp.square(slope))

  params = draw({'w': (3, 4), 'b': (4,), 'v': (4,)}, 'gradient_inside_the_loss')
  return Model(loss_fn, params, batch_maker({'x': (2, 3)}), may_fall_back=('w', 'v'))


# --- Norms.


@entry
def norms():
  """Epsilons are large: where a variance is small, float32 loses digits whoever clips."""

  class Norms(nn.Module):
    @nn.compact
    def __call__(self, x_HxWxD):
      x = nn.LayerNorm(epsilon=0.1)(x_HxWxD)
      x = nn.Dense(4)(x)
      x = nn.RMSNorm(epsilon=0.1)(x)
      x = nn.GroupNorm(2, epsilon=0.1)(x[None])[0]
      x = nn.LayerNorm(epsilon=0.1, reduction_axes=(0, 1), feature_axes=(1, 2))(x)
      return nn.LayerNorm(use_bias=False, epsilon=0.1)(jnp.tanh(x))

  return linen(Norms(), x=(2, 3, 5))


@entry
def norm_with_one_plus_scale():
  def forward(p, x):
    x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)
    x = (x * (1 + p['g'])) @ p['w']
    return x * (1 + p['h'].astype(x.dtype))

  return plain(forward, {'g': (4,), 'h': (3,), 'w': (4, 3)}, x=(5, 4))


@entry
def weight_norm():
  class WeightNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(jnp.tanh(nn.WeightNorm(nn.Dense(4))(x)))

  return linen(
    WeightNorm(),
    fallback=('Dense_1/kernel', 'WeightNorm_0/Dense_1/kernel/scale'),
    x=(3, 5),
  )


@entry
def standardised_convolution():
  class Standardised(nn.Module):
    @nn.compact
    def __call__(self, x):
      kernel = self.param('kernel', nn.initializers.normal(), (2, 2, 2, 3), x.dtype)
      mean, variance = jnp.mean(kernel, (0, 1, 2)), jnp.var(kernel, (0, 1, 2))
      kernel = (kernel - mean) * lax.rsqrt(variance + 1e-3)
      x = lax.conv_general_dilated(
        x[None], kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )[0]
      return nn.Dense(2)(nn.relu(x))

  return linen(Standardised(), fallback=('kernel',), x=(3, 4, 2))


# --- Lone parameters.


@entry
def vision_tokens():
  """Class token, positions, registers, mask token, layer scale, prefix."""

  class VisionTokens(nn.Module):
    @nn.compact
    def __call__(self, x_TxD, hidden_T):
      normal = nn.initializers.normal()
      x_TxD = jnp.where(hidden_T[:, None], self.param('mask_token', normal, (4,)), x_TxD)
      x_TxD = nn.Dense(4)(x_TxD) + self.param('positions', normal, (1, 5, 4))[0, : len(x_TxD)]
      token_1xD = self.param('class_token', normal, (1, 4))
      x_TxD = jnp.concatenate([token_1xD, x_TxD, self.param('registers', normal, (2, 4))])
      x_TxD = x_TxD + self.param('layer_scale', normal, (4,)) * jnp.tanh(nn.Dense(4)(x_TxD))
      pooled = jnp.concatenate([x_TxD[0], x_TxD[1:].mean(0)])
      return nn.Dense(3)(pooled)

  return linen(VisionTokens(), x=(3, 4), hidden=flags(3))


@entry
def learnt_scalars():
  """Temperature, PReLU, softplus, threshold, gate: parameters inside functions."""

  class LearntScalars(nn.Module):
    @nn.compact
    def __call__(self, x):
      normal = nn.initializers.normal()
      scalar = lambda name, shape=(): self.param(name, normal, shape)
      x = nn.PReLU()(x) * jnp.exp(scalar('log_temperature'))
      x = jnp.maximum(x, scalar('threshold', (4,))) + jax.nn.softplus(scalar('soft', (4,)))
      x = x * jax.nn.sigmoid(scalar('gate', (3, 1))) / (1 + jnp.square(scalar('divisor')))
      centred = scalar('centred', (4,))
      x = jnp.abs(x + 2) ** (1 + 0.1 * scalar('power')) - (centred - jnp.mean(centred))
      return jax.nn.softmax(x * jnp.clip(scalar('clipped'), -1, 1), -1)

  return linen(LearntScalars(), x=(3, 4))


@entry
def resized_positions():
  """A linear map of a lone parameter, by products with constants."""

  def forward(p, x):
    positions = jax.image.resize(p['positions'], (3, 5, 4), 'bilinear')
    return jnp.tanh(x + positions) @ p['w']

  return plain(
    forward,
    {'positions': (2, 3, 4), 'w': (4, 2)},
    may_fall_back=('positions',),
    x=(3, 5, 4),
  )


@entry
def filters_in_fourier_space():
  """A parameter times data, both complex."""

  def forward(p, x):
    filtered = jnp.fft.rfft(x, axis=0) * (p['real'] + 1j * p['imaginary'])
    return jnp.fft.irfft(filtered, n=6, axis=0) @ p['w']

  return plain(
    forward,
    {'real': (4, 3), 'imaginary': (4, 3), 'w': (3, 2)},
    may_fall_back=('real', 'imaginary'),
    x=(6, 3),
  )


# --- Parameters that are not trained by this loss.


@entry
def frozen_and_unused():
  closed_over = draw({'kernel': (3, 4), 'bias': (4,)}, 'closed over')

  def forward(p, x):
    x = jnp.tanh(x @ lax.stop_gradient(p['frozen']))
    half = p['half']
    x = x + jnp.tanh(x @ half) + x @ lax.stop_gradient(half)
    x = jnp.tanh(x @ closed_over['kernel'].astype(x.dtype) + closed_over['bias'].astype(x.dtype))
    return x @ p['trained'] + 0.0 * p['zero'] + p['rounded'].astype(np.int32)

  shapes = {
    'frozen': (5, 3),
    'half': (3, 3),
    'unused': (2, 2),
    'zero': (2,),
    'rounded': (2,),
    'trained': (4, 2),
  }
  return plain(forward, shapes, x=(4, 5))


# --- Scans.


class Block(nn.Module):
  """A residual block, as `nn.scan` wants it: a carry and an output."""

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.LayerNorm(epsilon=1e-3)(x)
    y = nn.Dense(x.shape[-1], use_bias=False)(nn.gelu(nn.Dense(6)(y)))
    return x + y, None


class Plain(nn.Module):
  """A residual block that returns its output alone."""

  @nn.compact
  def __call__(self, x):
    return Block()(x)[0]


class Layers(nn.Module):
  """Blocks stacked by `nn.scan`, then a head."""

  block: Any = Block

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(self.block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
    return nn.Dense(2)(layers()(x, None)[0])


@entry
def scan_over_layers():
  return linen(Layers(), x=(3, 4))


@entry
def scan_over_rematerialised_layers():
  return linen(Layers(nn.remat(Block)), x=(3, 4))


@entry
def remat_scan():
  class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(nn.remat_scan(Plain, lengths=(2, 2))()(x))

  return linen(RematScan(), x=(3, 4))


@entry
def scan_over_stacked_parameters():
  """Stacked weights, biases, scales and stacked inputs; outputs are used too."""

  def forward(p, x, extra):
    def layer(x, layer):
      w, extra_D = layer
      y = jnp.tanh((x * w['scale'] + extra_D) @ w['in'] + w['bias'])
      return x + y @ w['out'].T, y.mean(0)

    x, means = lax.scan(layer, x, (p['layers'], extra), reverse=True, unroll=2)
    return x.sum(0) + means.sum(0) @ p['head']

  shapes = {
    'layers': {'in': (3, 4, 5), 'out': (3, 4, 5), 'bias': (3, 5), 'scale': (3, 4)},
    'head': (5, 4),
  }
  return plain(forward, shapes, x=(2, 4), extra=(3, 4))


@entry
def scan_over_time():
  """A recurrent network: one weight at every step, a learnt first state, reversed too."""

  def forward(p, x):
    def step(h, x):
      h = jnp.tanh(x @ p['in'] + h @ p['hidden'] + p['bias'])
      return h, h * p['scale']

    h, ys = lax.scan(step, p['first'], x)
    _, zs = lax.scan(step, h, x, reverse=True)
    return jnp.concatenate([ys, zs]) @ p['out']

  shapes = {
    'in': (3, 4),
    'hidden': (4, 4),
    'bias': (4,),
    'scale': (4,),
    'first': (4,),
    'out': (4, 2),
  }
  return plain(forward, shapes, x=(5, 3))


@entry
def recurrent_cells():
  class Cells(nn.Module):
    @nn.compact
    def __call__(self, x):
      kind = dict(param_dtype=x.dtype)  # of the first state, too
      x = nn.RNN(nn.GRUCell(4, **kind))(x)
      return nn.RNN(nn.OptimizedLSTMCell(3, **kind), reverse=True)(x)

  return linen(
    Cells(),
    may_fall_back=tuple(f'OptimizedLSTMCell_0/{x}{g}/kernel' for x in 'ih' for g in 'ifgo'),
    x=(4, 3),
  )


@entry
def nested_scans():
  """Layers outside, time inside: stacked over one, shared over the other."""

  def forward(p, x):
    def layer(x, w):
      def step(h, x):
        h = jnp.tanh(x @ w['in'] + h @ w['hidden'] + w['bias'] + h @ p['shared'])
        return h, h

      return lax.scan(step, jnp.zeros_like(x[0]), x)[1], None

    return lax.scan(layer, x, p['layers'])[0]

  shapes = {'layers': {'in': (2, 4, 4), 'hidden': (2, 4, 4), 'bias': (2, 4)}, 'shared': (4, 4)}
  return plain(forward, shapes, x=(3, 4))


@entry
def scan_over_tokens():
  """Look-ups, convolutions and a tied matrix inside a scan."""

  def forward(p, tokens, x):
    def step(h, inputs):
      token, x = inputs
      h = jnp.tanh(h + jnp.take(p['e'], token, axis=0))
      y = lax.conv_general_dilated(
        x[None], p['conv'], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
      )
      return h + y[0].mean(0), p['e'] @ h

    return lax.scan(step, jnp.zeros(4, x.dtype), (tokens, x))[1] + p['e'][tokens] @ p['e'].T

  shapes = {'e': (VOCAB, 4), 'conv': (2, 3, 4)}
  return plain(forward, shapes, tokens=ids(VOCAB, 3), x=(3, 5, 3))


@entry
def loops_with_unusual_weights():
  """A weight sliced at each step, and one that is carried along."""

  def forward(p, x):
    x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p['sliced'][i]), x)

    def step(carry, _):
      x, w = carry
      return (jnp.tanh(x @ w), w), None

    (x, _), _ = lax.scan(step, (x, p['carried']), None, length=2)
    return x

  return plain(
    forward,
    {'sliced': (3, 4, 4), 'carried': (4, 4)},
    may_fall_back=('sliced', 'carried'),
    x=(2, 4),
  )


# --- Functions within the loss: remat, jit, vmap, branches, custom derivatives.


@entry
def remat():
  class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.remat(Plain)()(x)
      return nn.remat(nn.Dense)(3)(nn.jit(nn.Dense)(4)(x))

  return linen(Remat(), x=(3, 4))


@entry
def checkpoint_with_policies():
  def forward(p, x):
    def block(w, x):
      x = checkpoint_name(jnp.tanh(x @ w['a'] + w['c']), 'hidden')
      return jnp.tanh(lax.optimization_barrier(x @ w['b'])) * w['c'][:4]

    x = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)(p[0], x)
    policy = jax.checkpoint_policies.save_only_these_names('hidden')
    x = x + jax.checkpoint(block, policy=policy)(p[1], x)
    inner = jax.checkpoint(jax.jit(block))
    return jax.checkpoint(lambda x: inner(p[0], inner(p[1], x)))(x)

  shapes = [{'a': (4, 5), 'b': (5, 4), 'c': (5,)}] * 2
  return plain(forward, shapes, x=(3, 4))


@entry
def jit_inside():
  def forward(p, x):
    dense = jax.jit(lambda w, x: jnp.tanh(x @ w['kernel'] + w['bias']))
    both = jax.jit(lambda p, x: dense(p[1], dense(p[0], x)))
    with jax.named_scope('head'):
      return both(p, x) + dense(p[1], dense(p[0], -x))

  return plain(forward, [{'kernel': (4, 4), 'bias': (4,)}] * 2, x=(3, 4))


@entry
def augmentation_multiplicity():
  """The loss of an example is the mean over its views; the example is the unit."""

  class Views(nn.Module):
    @nn.compact
    def __call__(self, x_HxWxC, tokens_T):
      x_D = nn.Conv(4, (2, 2), (2, 2))(x_HxWxC).reshape(-1, 4).mean(0)
      x_D = nn.LayerNorm(epsilon=1e-3)(x_D + nn.Embed(VOCAB, 4)(tokens_T).sum(0))
      return nn.Dense(3)(x_D)

  base = linen(Views(), x=(4, 4, 2), tokens=ids(VOCAB, 3))
  views = 3

  def make_batch(rng, size):
    noise, flip = rng.normal(size=(size, views, 4, 4, 2)), rng.random((size, views)) < 0.5
    return {**base.make_batch(rng, size), 'noise': noise, 'flip': flip}

  def loss_fn(params, example):
    def of_view(noise, flip):
      view = {**example, 'x': jnp.where(flip, -1, 1) * example['x'] + noise}
      return base.loss_fn(params, view)

    example = dict(example)
    return jnp.mean(jax.vmap(of_view)(example.pop('noise'), example.pop('flip')))

  return Model(loss_fn, base.params, make_batch)


@entry
def experts():
  """Weights with an axis that is mapped over: heads, an ensemble, a mixture of experts."""

  class Experts(nn.Module):
    @nn.compact
    def __call__(self, x_TxD):
      ensemble = nn.vmap(
        nn.Dense, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=None,
        out_axes=1, axis_size=3,
      )(4)  # fmt: skip
      gates_TxE = jax.nn.softmax(nn.Dense(3)(x_TxD))
      mixed_TxD = jnp.einsum('te,ted->td', gates_TxE, jnp.tanh(ensemble(x_TxD)))
      normal = nn.initializers.normal()
      up_ExDxF, down_ExFxD = (
        self.param('up', normal, (3, 4, 5)),
        self.param('down', normal, (3, 5, 4)),
      )
      hidden_TxExF = nn.relu(jnp.einsum('td,edf->tef', mixed_TxD, up_ExDxF))
      mapped = jax.vmap(lambda w_FxD, h_TxF: h_TxF @ w_FxD, (0, 1), 1)(down_ExFxD, hidden_TxExF)
      return jnp.einsum('ted,te->td', mapped, gates_TxE)

  return linen(Experts(), x=(2, 4))


@entry
def routed_experts():
  """A whole weight matrix chosen by the example."""

  def forward(p, x, expert):
    return jnp.tanh(x @ p['one'][expert]) + jnp.einsum(
      'ti,tij->tj', x, p['each'][jnp.argmax(x, -1)]
    )

  return plain(
    forward,
    {'one': (3, 4, 2), 'each': (4, 4, 2)},
    may_fall_back=('one', 'each'),
    x=(3, 4),
    expert=ids(3),
  )


@entry
def branches_on_activations():
  def forward(p, x, kind):
    x = x @ p['a']
    x = lax.cond(jnp.sum(x) > 0, jnp.tanh, lambda x: x * 0.5, x)
    x = lax.switch(kind, [jnp.sin, jnp.cos, lambda x: x], x) @ p['b']
    x = lax.map(lambda row: jnp.cumsum(row) + jnp.sort(row), x)
    steps = lax.while_loop(lambda n: n < kind + 2, lambda n: n + 1, 0)
    return jnp.where(x > 0, x, -0.1 * x) * steps

  return plain(forward, {'a': (3, 4), 'b': (4, 5)}, x=(2, 3), kind=ids(3))


@entry
def branches_with_weights():
  """Weights and biases used inside branches and a map."""

  def forward(p, x, kind):
    x = lax.cond(
      jnp.sum(x) > 0, lambda x: jnp.tanh(x @ p['a']), lambda x: x @ p['b'] + p['bias'], x
    )
    x = lax.map(lambda row: jnp.tanh(row @ p['mapped'] + p['bias']), x)
    return lax.switch(kind, [lambda x: x @ p['a'], lambda x: x * p['bias'], jnp.sin], x)

  return plain(
    forward,
    {'a': (4, 4), 'b': (4, 4), 'mapped': (4, 4), 'bias': (4,)},
    may_fall_back=('a', 'b', 'bias', 'mapped'),
    x=(3, 4),
    kind=ids(3),
  )


@entry
def custom_derivatives():
  """Custom derivatives of activations: of jax, of the author, of either kind."""

  @jax.custom_vjp
  def reversed_gradient(x, strength):
    return x * 1.0

  reversed_gradient.defvjp(
    lambda x, strength: (x * 1.0, strength), lambda strength, g: (-strength * g, None)
  )

  @jax.custom_jvp
  def safe_norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), -1))

  @safe_norm.defjvp
  def _(primals, tangents):
    (x,), (t,) = primals, tangents
    norm = safe_norm(x)
    return norm, jnp.sum(x * t, -1) / (norm + 0.1)

  def forward(p, x):
    x = jax.nn.relu(x @ p['a']) + jax.nn.gelu(x @ p['b'], approximate=False)
    x = reversed_gradient(x, 0.5) @ p['c'] + jax.nn.relu6(x @ p['d'])
    x = x + jnp.clip(lax.stop_gradient(jnp.round(x) - x) + x, -2, 2)
    scale = jax.nn.logsumexp(x, -1) + safe_norm(x)
    return jax.nn.log_softmax(x) * scale[:, None] + jnp.linalg.norm(x)

  return plain(forward, {'a': (3, 4), 'b': (3, 4), 'c': (4, 5), 'd': (4, 5)}, x=(3, 3))


@entry
def backward_pass_that_is_not_linear():
  """Gradients clipped and rounded on their way back: twice the loss is not twice the gradient."""

  @jax.custom_vjp
  def bounded(x):
    return x * 1.0

  bounded.defvjp(lambda x: (x * 1.0, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))

  @jax.custom_vjp
  def rounded(x):
    return x * 1.0

  rounded.defvjp(
    lambda x: (x * 1.0, None),
    lambda _, g: (lax.reduce_precision(g, exponent_bits=8, mantissa_bits=4),),
  )

  def forward(p, x):
    return rounded(jnp.tanh(bounded(x @ p['a'])) @ p['b'] + p['c']) ** 2

  return plain(forward, {'a': (3, 4), 'b': (4, 5), 'c': (5,)}, x=(2, 3))


@entry
def custom_derivatives_of_parameters():
  """A quantised weight, a rectified weight, a quantised bias."""

  @jax.custom_vjp
  def quantise(w):
    return jnp.round(w * 4) / 4

  quantise.defvjp(lambda w: (quantise(w), w), lambda w, g: (g * (jnp.abs(w) < 1),))

  def forward(p, x):
    return jnp.tanh(x @ quantise(p['w']) + quantise(p['b'])) @ jax.nn.relu(p['v']) @ p['u']

  return plain(
    forward,
    {'w': (3, 4), 'b': (4,), 'v': (4, 5), 'u': (5, 2)},
    fallback=('w', 'v'),
    may_fall_back=('b',),
    x=(2, 3),
  )


@entry
def dropout():
  """Every example brings its own random key."""

  class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x, key):
      x = nn.Dropout(0.4, deterministic=False)(nn.Dense(5)(x), rng=key)
      return nn.Dense(3)(jnp.tanh(x))

  make_keys = lambda rng, size: jax.random.split(jax.random.key(int(rng.integers(2**31))), size)
  return linen(Dropout(), x=(3, 4), key=make_keys)


# --- Parameters that are changed before they are used.


@entry
def fused_projections():
  """One kernel for queries, keys and values, taken apart before or after the product."""

  def forward(p, x):
    q_w, k_w, v_w = jnp.split(p['before'], 3, axis=1)
    q, k, v = x @ q_w, x @ k_w, x @ v_w
    x = jax.nn.softmax(q @ k.T) @ v
    q, k, v = jnp.split(x @ p['after'], [2, 4], axis=1)
    x = jax.nn.softmax(q @ k.T) @ v
    return x @ p['rows'][:5] + p['rows'][5]  # a weight and a bias in one array

  shapes = {'before': (3, 12), 'after': (4, 9), 'rows': (6, 2)}
  return plain(forward, shapes, fallback=('rows',), x=(3, 3))


@entry
def overlapping_slices():
  def forward(p, x):
    return jnp.tanh(x @ p['w'][:, :4]) + jnp.tanh(x @ p['w'][:, 2:]) @ p['w'][:, :4].T[:, :1]

  return plain(forward, {'w': (3, 6)}, may_fall_back=('w',), x=(2, 3))


@entry
def stacked_layers_by_index():
  def forward(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p['kernel'][i] + p['bias'][i])
    return x @ p['kernel'][-1]

  return plain(forward, {'kernel': (3, 4, 4), 'bias': (3, 4)}, x=(2, 4))


@entry
def concatenated_weights():
  def forward(p, x):
    return jnp.tanh(x @ jnp.concatenate([p['q'], p['k']], 1)) @ jnp.stack([p['u'], p['v']], 1)

  return plain(
    forward,
    {'q': (3, 2), 'k': (3, 3), 'u': (5,), 'v': (5,)},
    may_fall_back=('q', 'k', 'u', 'v'),
    x=(2, 3),
  )


@entry
def views_of_weights():
  """Reshaped, transposed, cast, broadcast: still the same entries."""

  def forward(p, x):
    x = jnp.tanh(x @ p['flat'].reshape(4, 5))
    x = jnp.tanh(x @ p['turned'].transpose(1, 2, 0).reshape(5, 4))
    x = jnp.tanh(x @ p['twice'].T.T.astype(x.dtype)[None][0])
    return jnp.squeeze(p['padded'], 1).T @ x[..., None]

  shapes = {'flat': (20,), 'turned': (4, 5, 1), 'twice': (4, 3), 'padded': (3, 1, 2)}
  return plain(forward, shapes, x=(2, 4))


@entry
def scaled_weights():
  """A weight times constants, a masked weight, one weight for all heads, a flipped one."""

  def forward(p, x):
    x = jnp.tanh(x @ (p['scaled'] / 4**0.5))
    x = jnp.tanh(x @ (p['masked'] * np.tri(5)))
    x = jnp.tanh(jnp.einsum('ti,hij->thj', x, jnp.broadcast_to(p['repeated'], (2, 5, 3)))).sum(1)
    return x @ p['flipped'][::-1] + x @ -p['negative']

  return plain(
    forward,
    {'scaled': (4, 5), 'masked': (5, 5), 'repeated': (5, 3), 'flipped': (3, 2), 'negative': (3, 2)},
    may_fall_back=('scaled', 'masked', 'repeated', 'flipped', 'negative'),
    x=(3, 4),
  )


@entry
def regularised():
  """Weight decay inside the loss: an example's gradient holds a term without example."""

  def loss_fn(p, example):
    error = jnp.square(jnp.tanh(example['x'] @ p['w'] + p['b']) @ p['v'] - example['y']).mean()
    return error + 0.1 * jnp.sum(jnp.square(p['w'])) + 0.1 * jnp.sum(jnp.abs(p['b']))

  params = draw({'w': (3, 4), 'b': (4,), 'v': (4, 2)}, 'regularised')
  return Model(loss_fn, params, batch_maker({'x': (3, 3), 'y': (3, 2)}), fallback=('w',))


@entry
def low_rank_adapters():
  """Adapters beside a frozen kernel."""
  kernel = draw((4, 5), 'kernel')

  def forward(p, x):
    return x @ kernel.astype(x.dtype) + (x @ p['a']) @ p['b'] * 2.0 + p['bias']

  return plain(forward, {'a': (4, 2), 'b': (2, 5), 'bias': (5,)}, x=(3, 4))


@entry
def merged_adapters():
  forward = lambda p, x: jnp.tanh(x @ p['w'] + x @ (p['a'] @ p['b']))
  return plain(
    forward, draw({'a': (4, 2), 'b': (2, 5), 'w': (4, 5)}, 'm'), fallback=('a', 'b'), x=(3, 4)
  )


# --- Whole models.


def _captioner(dtype=None, **settings) -> Model:
  """The project's own model; `dtype` None computes in that of the parameters."""
  module = models.make_model('captioner', size='micro', image_size=16, vocab_size=11, **settings)

  def make_batch(rng, size):
    tokens = rng.integers(1, 11, size=(size, 6))
    tokens[np.arange(6) >= rng.integers(2, 7, size=(size, 1))] = models.PADDING
    return {'image': rng.normal(size=(size, 16, 16, 3)), 'tokens': tokens.astype(np.int32)}

  example = one(make_batch)
  variables = jax.eval_shape(module.init, jax.random.key(0), example['image'], example['tokens'])
  variables = draw(variables, 'captioner')

  def loss_fn(params, example):
    model = module.clone(dtype=dtype or jax.tree.leaves(params)[0].dtype)
    return model.apply({**variables, 'params': params}, example['image'], example['tokens'])

  return Model(loss_fn, variables['params'], make_batch)


@entry
def captioner():
  return _captioner()


@entry
def captioner_in_scanned_blocks_with_remat():
  return _captioner(scan_blocks=True, remat=True)


@entry
def masked_autoencoder():
  """Its class token, mask token and positions are trained; an example brings its own mask."""
  module = models.MAE(4, 8, 1, 2, 12, 1, 3, train_positions=True)  # of 6 patches it keeps one

  def make_batch(rng, size):
    bits = rng.integers(0, 2**32, size=(size, 2), dtype=np.uint32)
    return {'image': rng.normal(size=(size, 8, 12, 3)), 'key': bits}

  example = one(make_batch)
  shapes = jax.eval_shape(module.init, jax.random.key(0), example['image'], example['key'])

  def loss_fn(params, example):
    model = module.clone(dtype=jax.tree.leaves(params)[0].dtype)
    return model.apply({'params': params}, example['image'], example['key'])

  return Model(loss_fn, draw(shapes['params'], 'mae'), make_batch)


BFLOAT16: dict[str, Callable[[], Model]] = {}


def bfloat16_entry(build):
  """Adds a model that computes in bfloat16 with float32 parameters."""
  BFLOAT16[build.__name__] = functools.cache(build)
  return build


@bfloat16_entry
def dense_and_norm_in_bfloat16():
  class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
      kind = dict(dtype=jnp.bfloat16)
      x = nn.LayerNorm(**kind)(nn.Dense(5, **kind)(x))
      x = x + nn.MultiHeadDotProductAttention(1, qkv_features=5, **kind)(x)
      return nn.Dense(3, **kind)(nn.gelu(x)).astype(jnp.float32)

  return linen(Half(), x=(4, 3))


@bfloat16_entry
def embedding_and_conv_in_bfloat16():
  class Half(nn.Module):
    @nn.compact
    def __call__(self, x, tokens):
      kind = dict(dtype=jnp.bfloat16)
      embed = nn.Embed(VOCAB, 4, **kind)
      x = nn.tanh(nn.Conv(4, (2, 2), **kind)(x)).reshape(-1, 4).mean(0)
      return embed.attend(embed(tokens) + x).astype(jnp.float32)

  return linen(Half(), x=(3, 4, 2), tokens=ids(VOCAB, 6))


@bfloat16_entry
def layers_in_bfloat16():
  def forward(p, x):
    def layer(x, w):
      x = jnp.tanh(jnp.dot(x, w['a'].astype(x.dtype), preferred_element_type=jnp.float32))
      return (x * w['s']).astype(jnp.bfloat16), None

    x = x.astype(jnp.bfloat16)
    return lax.scan(layer, x, p)[0].astype(jnp.float32)

  return plain(forward, {'a': (3, 4, 4), 's': (3, 4)}, x=(3, 4))


@bfloat16_entry
def captioner_in_bfloat16():
  return _captioner(jnp.bfloat16)
