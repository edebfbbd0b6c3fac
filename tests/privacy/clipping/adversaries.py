"""Examples that a search can climb on, and losses that give an example all it could want.

Losses are linear in the parameters, sum(g * layer(x, w)): an example then dictates the inputs
x and the output gradients g of every site, and rounding is all that can go wrong. An example
is written down as a few dozen numbers in [0, 1] (GENES): how many kinds of tokens there are,
how little they differ, whether they cancel, their sizes, their order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

# --- Examples from genes.

GENES = (
  'seed', 'blocks', 'kinds', 'order', 'share', 'alternate', 'balance', 'x_base', 'g_base',
  'x_difference', 'g_difference', 'x_where', 'g_where', 'x_mantissa', 'g_mantissa', 'x_size',
  'g_size', 'tokens_spread', 'tokens_opposed', 'x_spread', 'g_spread', 'noise', 'turn',
)  # fmt: skip
BASES = ('flat', 'flat', 'normal', 'normal', 'signs', 'one channel', 'ramp', 'all sizes', 'two')


def choose(gene, options):
  """The option that a gene in [0, 1] stands for."""
  return options[min(int(gene * len(options)), len(options) - 1)]


def optional(gene, low, high):
  """0 for a third of the genes, or 10 to a power between low and high."""
  return 0.0 if gene < 1 / 3 else 10 ** (low + (gene - 1 / 3) * 1.5 * (high - low))


def _size(gene):
  """Ordinary for most genes, and down to subnormal and up to near the end for the others."""
  if gene < 0.7:
    return 10 ** (-4 + gene / 0.7 * 10)
  return 10 ** (-45 + (gene - 0.7) / 0.3 * 75)


def _base(kind, rng, width):
  """A vector that all tokens of a block are variations of."""
  normal, channel = rng.normal(size=width), rng.integers(width)
  return {
    'flat': lambda: np.ones(width),
    'normal': lambda: normal,
    'signs': lambda: np.sign(normal),
    'one channel': lambda: np.where(np.arange(width) == channel, 1.0, 0.0),
    'ramp': lambda: np.linspace(1, 2, width),
    'all sizes': lambda: normal * np.exp(3 * rng.normal(size=width)),
    'two': lambda: np.where(np.arange(width) % 2, 1.0, normal[0]),
  }[kind]()


def _where(gene, rng, width):
  """Where tokens of one base differ: in all of it alike, in one channel or at random."""
  kind = choose(gene, ('alike', 'alike', 'one channel', 'normal'))
  base = {'alike': 'flat'}.get(kind, kind)
  return _base(base, rng, width)


def decoded(genome) -> dict[str, Any]:
  """What the genes of one parameter's tokens say, to be read by people."""
  gene = dict(zip(GENES, map(float, genome), strict=True))
  return {
    'seed': int(gene['seed'] * 2**32),
    'blocks': choose(gene['blocks'], (1, 1, 1, 2, 3, 8)),
    'kinds': choose(gene['kinds'], (1, 2, 2, 2, 3, 4, 10**6)),
    'order': choose(gene['order'], ('sorted', 'in turn', 'shuffled')),
    'share': 4 ** (2 * gene['share'] - 1),
    'alternate': gene['alternate'] > 0.3,
    'balance': gene['balance'] > 0.5,
    'x_base': choose(gene['x_base'], BASES),
    'g_base': choose(gene['g_base'], BASES),
    'x_difference': optional(gene['x_difference'], -8, 0),
    'g_difference': optional(gene['g_difference'], -8, 0),
    'x_where': gene['x_where'],
    'g_where': gene['g_where'],
    'x_size': (1 + gene['x_mantissa']) * _size(gene['x_size']),
    'g_size': (1 + gene['g_mantissa']) * _size(gene['g_size']),
    'tokens_spread': 10.0 ** -max(0, 60 * gene['tokens_spread'] - 30),
    'tokens_opposed': gene['tokens_opposed'] > 0.5,
    'x_spread': 10.0 ** -max(0, 60 * gene['x_spread'] - 30),
    'g_spread': 10.0 ** -max(0, 60 * gene['g_spread'] - 30),
    'noise': optional(max(0, 2 * gene['noise'] - 1), -8, 0),
    'turn': gene['turn'] > 0.7,
  }


def tokens(genome, count: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
  """Inputs (count, inputs) and output gradients (count, outputs) in float64."""
  genes = decoded(genome)
  rng = np.random.default_rng(genes['seed'])
  blocks = np.array_split(np.arange(count), genes['blocks'])
  xs, gs = zip(*[_block(genes, rng, len(b), inputs, outputs) for b in blocks if len(b)])
  x, g = np.concatenate(xs), np.concatenate(gs)
  odd = np.arange(count) % 2
  # Some tokens tiny in what they are fed, and huge in their gradients or not.
  x *= (genes['tokens_spread'] ** odd)[:, None]
  g *= (genes['tokens_spread'] ** -(odd * genes['tokens_opposed']))[:, None]
  x *= genes['x_spread'] ** (np.arange(inputs) % 2)
  g *= genes['g_spread'] ** (np.arange(outputs) % 2)
  x, g = x * genes['x_size'], g * genes['g_size']
  return (x[::-1], g[::-1]) if genes['turn'] else (x, g)


def _block(genes, rng, count, inputs, outputs):
  kinds = min(genes['kinds'], count)
  kind = np.floor(kinds * (np.arange(count) / count) ** genes['share'])
  if genes['order'] == 'in turn':
    kind = np.arange(count) % kinds
  if genes['order'] == 'shuffled':
    kind = rng.permutation(kind)
  sign = 1 - 2 * (kind % 2) if genes['alternate'] else np.ones(count)
  if genes['balance'] and (sign < 0).any():
    sign = np.where(sign < 0, sign * np.sum(sign > 0) / np.sum(sign < 0), sign)
  x_base, g_base = _base(genes['x_base'], rng, inputs), _base(genes['g_base'], rng, outputs)
  differ = lambda base, size, where: base * (
    1 + size * np.outer(kind, _where(where, rng, len(base)))
  )
  x = differ(x_base, genes['x_difference'], genes['x_where'])
  g = sign[:, None] * differ(g_base, genes['g_difference'], genes['g_where'])
  noisy = lambda y: y + genes['noise'] * rng.normal(size=y.shape) if genes['noise'] else y
  return noisy(x), noisy(g)


# --- Cases: losses that are linear in their parameters.


class Use(NamedTuple):
  """One use of a parameter.

  Attributes:
    apply: (x, w) -> y, linear in w; y may have its entries in other axes.
    x, y: (tokens, channels).
    turned: a transposed use, whose outputs are where the others of its parameter have inputs.
    rows: x is the channel in which a token is largest, as one looks up a row of a table.
  """

  apply: Callable
  x: tuple[int, int]
  y: tuple[int, int]
  turned: bool = False
  rows: bool = False


class Case(NamedTuple):
  """Parameters (shapes) by name, the uses of each, and the type that products have.

  `params_type` is the type of the parameters themselves. With `rest`, output gradients are what is
  left of a product after its rounded value was taken away: nothing, or what its rounding took.
  """

  params: dict[str, tuple[int, ...]]
  uses: dict[str, tuple[Use, ...]]
  dtype: Any = jnp.float32
  params_type: Any = jnp.float32
  rest: bool = False

  def loss(self, params, example):
    """sum(g * apply(x, w)) over all uses."""
    total = 0.0
    for name, uses in self.uses.items():
      for use, (x, g) in zip(uses, example[name], strict=True):
        x = x if use.rows else x.astype(self.dtype)
        if self.rest:
          u, v, product = g
          g = u * v - product
        y = use.apply(x, params[name].astype(self.dtype)).reshape(use.y)
        total += jnp.sum(y.astype(jnp.float32) * g)
    return total

  def zeros(self):
    """The parameters: that they are zero changes no gradient."""
    return {name: jnp.zeros(shape, self.params_type) for name, shape in self.params.items()}

  def example(self, genome):
    """From genes (parameters, GENES): {name: [(x, g) of each use]}, in float32."""
    made = {}
    for genes, (name, uses) in zip(genome, self.uses.items(), strict=True):
      counts = [max(use.x[0], use.y[0]) for use in uses]
      widths = [(u.y[1], u.x[1]) if u.turned else (u.x[1], u.y[1]) for u in uses]
      inputs, outputs = np.max(widths, axis=0)
      x, g = tokens(genes, sum(counts), inputs, outputs)
      made[name], start = [], 0
      for use, count in zip(uses, counts):
        a, b = x[start : start + count], g[start : start + count]
        a, b = (b, a) if use.turned else (a, b)
        a, b = a[: use.x[0], : use.x[1]], b[: use.y[0], : use.y[1]]
        with np.errstate(over='ignore'):
          a = np.argmax(np.abs(a), axis=1).astype(np.int32) if use.rows else a.astype(np.float32)
          b = b.astype(np.float32)
          if self.rest:
            u, v = b[0], b[0, ::-1]
            b = (u, v, np.broadcast_to(u * v, b.shape))
          made[name].append((a, b))
        start += count
    return made

  def entries(self):
    """Numbers that an example and a gradient hold: what it costs to measure one."""
    shapes = [*self.params.values()]
    shapes += [shape for uses in self.uses.values() for u in uses for shape in (u.x, u.y)]
    return sum(map(math.prod, shapes))


def _product(inputs, outputs, count, **kwargs):
  use = Use(jnp.dot, (count, inputs), (count, outputs))
  return Case({'w': (inputs, outputs)}, {'w': (use,)}, **kwargs)


def _convolution(size, kernel, inputs, outputs, **kwargs):
  convolve = lambda x, w: lax.conv_general_dilated(
    x.reshape(1, size, size, inputs), w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  use = Use(convolve, (size**2, inputs), (size**2, outputs))
  return Case({'w': (kernel, kernel, inputs, outputs)}, {'w': (use,)}, **kwargs)


_look_up = lambda x, w: w[x]
_turned = lambda x, w: x @ w.T
_over_time = lambda x, w: lax.scan(lambda _, x: (None, x @ w), None, x)[1]


def _over_layers(x, w):
  x = x.reshape(len(w), -1, w.shape[1])
  return lax.scan(lambda _, xw: (None, xw[0] @ xw[1]), None, (x, w))[1]


def _experts(x, w):
  return jnp.einsum('etk,eko->eto', x.reshape(len(w), -1, w.shape[1]), w)


def _direct(apply, count, width, **kwargs):
  return Case({'w': (width,)}, {'w': (Use(apply, (count, width), (count, width)),)}, **kwargs)


_scale = lambda x, w: x * w
_bias = lambda x, w: 0 * x + w

_OF_MANY_AXES = Use(lambda x, w: x.reshape(w.shape) * w, (1, 2**16), (1, 2**16))
_HALVES = (Use(jnp.dot, (3, 24), (3, 20)), Use(jnp.dot, (4, 24), (4, 20)))
_TIED = (Use(_look_up, (6, 12), (6, 30), rows=True), Use(_turned, (6, 30), (6, 12), turned=True))
_WITH_BIAS = {'w': (24, 20), 'b': (20,), 'table': (9, 20)}
_BLOCK = {
  'w': (Use(jnp.dot, (5, 24), (5, 20)),),
  'b': (Use(lambda x, w: 0 * x[:, :20] + w, (5, 24), (5, 20)),),
  'table': (Use(_look_up, (5, 9), (5, 20), rows=True),),
}

CASES = {
  'few tokens': _product(24, 20, 4),  # Gram matrices
  'many tokens': _product(6, 5, 40),  # formed
  'square': _product(31, 31, 40),  # formed, and one sum of squares without a tree
  'one token': _product(16, 12, 1),
  'wide': _product(768, 192, 50),
  'long': _product(8, 9, 2048),
  'longest': _product(2, 3, 20000),
  'few patches': _convolution(2, 3, 3, 32),
  'many patches': _convolution(9, 2, 2, 3),
  'large image': _convolution(128, 3, 1, 2),
  'look-ups': Case({'w': (5, 24)}, {'w': (Use(_look_up, (40, 5), (40, 24), rows=True),)}),
  'wide look-ups': Case({'w': (5, 768)}, {'w': (Use(_look_up, (40, 5), (40, 768), rows=True),)}),
  'many look-ups': Case({'w': (5, 6)}, {'w': (Use(_look_up, (2048, 5), (2048, 6), rows=True),)}),
  'two sites': Case({'w': (24, 20)}, {'w': _HALVES}),
  'tied': Case({'w': (12, 30)}, {'w': _TIED}),
  'over time': Case({'w': (24, 20)}, {'w': (Use(_over_time, (6, 24), (6, 20)),)}),
  'long over time': Case({'w': (6, 5)}, {'w': (Use(_over_time, (300, 6), (300, 5)),)}),
  'over layers': Case({'w': (3, 24, 20)}, {'w': (Use(_over_layers, (12, 24), (12, 20)),)}),
  'experts': Case({'w': (2, 24, 20)}, {'w': (Use(_experts, (8, 24), (8, 20)),)}),
  'bias': _direct(_bias, 40, 16),
  'scale': _direct(_scale, 40, 16),
  'wide scale': _direct(_scale, 2, 1000),
  'large scale': _direct(_scale, 1, 2**18),
  'scale of many axes': Case({'w': (2,) * 16}, {'w': (_OF_MANY_AXES,)}),
  'long scale': _direct(_scale, 4096, 4),
  'with bias': Case(_WITH_BIAS, _BLOCK),
  'rests': _product(64, 64, 24, rest=True),
  'rests of a scale': _direct(_scale, 40, 128, rest=True),
}
for _name, _narrow in [('bfloat16', jnp.bfloat16), ('float16', jnp.float16)]:
  for _case in (
    'few tokens', 'many tokens', 'tied', 'over time', 'over layers', 'scale', 'with bias',
  ):  # fmt: skip
    CASES[f'{_case}, {_name}'] = CASES[_case]._replace(dtype=_narrow)
for _case in ('few tokens', 'scale', 'with bias'):
  CASES[f'{_case}, all bfloat16'] = CASES[_case]._replace(
    dtype=jnp.bfloat16, params_type=jnp.bfloat16
  )
