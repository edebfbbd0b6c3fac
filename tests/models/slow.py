"""Parts of transformers from their equations in float64, one token and one head at a time."""

import math

import numpy as np


def slow_sincos(position, width):
  angles = [position / 10000 ** (2 * i / width) for i in range(width // 2)]
  return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def slow_image_position(row, column, width):
  return slow_sincos(column, width // 2) + slow_sincos(row, width // 2)


def slow_norm(x, p, eps):
  out = np.empty_like(x)
  for t, row in enumerate(x):
    variance = np.mean((row - row.mean()) ** 2)
    out[t] = (row - row.mean()) / math.sqrt(variance + eps) * p['scale'] + p['bias']
  return out


def slow_dense(x, p):
  return x @ p['kernel'] + p.get('bias', 0)


def slow_attention(q, k, v, heads, causal):
  size = q.shape[1] // heads
  out = np.zeros_like(q)
  for h in range(heads):
    c = slice(h * size, (h + 1) * size)
    for t in range(len(q)):
      seen = t + 1 if causal else len(k)
      scores = np.array([q[t, c] @ k[s, c] for s in range(seen)]) / math.sqrt(size)
      weights = np.exp(scores - scores.max())
      out[t, c] = (weights / weights.sum()) @ v[:seen, c]
  return out


def slow_mlp(x, p):
  h = slow_dense(x, p['mlp_in'])
  h = np.vectorize(lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))))(h)
  return slow_dense(h, p['mlp_out'])


def slow_blocks(x, params, heads):
  """What comes out of every block of an encoder, and the last of it after the norm."""
  outs = []
  for i in range(sum(name.startswith('block_') for name in params)):
    b = params[f'block_{i}']
    qkv = slow_dense(slow_norm(x, b['attention_norm'], 1e-6), b['attention_qkv'])
    h = slow_attention(*np.split(qkv, 3, axis=1), heads, causal=False)
    x = x + slow_dense(h, b['attention_out'])
    x = x + slow_mlp(slow_norm(x, b['mlp_norm'], 1e-6), b)
    outs.append(x)
  return outs, slow_norm(x, params['norm'], 1e-6)
