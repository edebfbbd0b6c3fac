"""Every drawn index arrives exactly once, in order, whatever the workers and the cutting."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from dpcap import data
from dpcap.data import groups, guarded, pipeline
from dpcap.data.source import BadRecord, Record
from dpcap.data.text import BytesTokenizer
from dpcap.privacy.sampling import PoissonSampler, augmentation_generator

_N = 500


class Numbered:
  """Record i has an image of colour (i // 256, i % 256, 0) and caption str(i)."""

  class_names = ('even', 'odd')

  def __init__(self, bad=()):
    self._bad = frozenset(bad)

  def __len__(self):
    return _N

  def __getitem__(self, index):
    if index in self._bad:
      raise BadRecord('made bad')
    image = np.zeros((4, 4, 3), np.uint8)
    image[:] = index // 256, index % 256, 0
    return Record(image=image, caption='' if index == 13 else str(index), label=index % 2)


def _draw(step, size=60):
  rng = np.random.default_rng(step)
  return np.flatnonzero(rng.random(_N) < size / _N)


def _no_rng(step, index):
  return np.random.default_rng([step, index])


def make_batches(
  draw=_draw, source=None, steps=4, physical=8, per_chunk=2, rows=1, local_rows=None, **transform
):
  return pipeline.LogicalBatches(
    source=source or Numbered(),
    transform=data.Transform(4, 8, BytesTokenizer(), **transform),
    draw=draw,
    augmentation_rng=_no_rng,
    steps=steps,
    expected_batch_size=60,
    physical_batch=physical,
    batches_per_chunk=per_chunk,
    rows=rows,
    local_rows=local_rows or range(rows),
  )


def _indices(chunk):
  pixels = chunk.examples['image'][chunk.mask][:, 0, 0].astype(int)
  return pixels[:, 0] * 256 + pixels[:, 1]


def _by_step(batches, elements):
  steps = {}
  for element, chunks in elements:
    steps.setdefault(element // batches.slots, []).extend(chunks)
  return steps


@pytest.mark.parametrize('physical,per_chunk', [(8, 2), (1, 1), (64, 3), (7, 1)])
def test_each_step_holds_exactly_its_draw(physical, per_chunk):
  batches = make_batches(physical=physical, per_chunk=per_chunk)
  steps = _by_step(batches, ((e, batches[e]) for e in range(len(batches))))
  for step in range(4):
    drawn = _draw(step)
    kept = drawn[drawn != 13]  # has no caption
    np.testing.assert_array_equal(np.concatenate([_indices(c) for c in steps[step]]), kept)
    assert sum(c.drawn for c in steps[step]) == len(drawn)
    for chunk in steps[step]:
      assert chunk.live == [-(-chunk.drawn // physical)]
      assert not chunk.mask[0, chunk.live[0] :].any()


class Grouped(Numbered):
  """Record i is the group of the records i, i + 100, ... of `Numbered`."""

  def __init__(self, folder):
    super().__init__()
    self.groups = groups.write(str(folder / 'all.json'), np.arange(_N) % 100, 'all')

  def __len__(self):
    return self.groups.count

  def read_samples(self, numbers):
    return (self[number] for number in numbers)


def test_a_group_that_is_drawn_gives_one_of_its_records_whatever_else_is_drawn(tmp_path):
  source = Grouped(tmp_path)
  read = {}
  for every, physical in ((1, 8), (8, 64), (16, 8)):
    drawn = np.setdiff1d(np.arange(0, 100, every), 13)  # whose captions are not all there
    batches = make_batches(lambda _, drawn=drawn: drawn, source, steps=40, physical=physical)
    # From step 20 on sample 216 is fatal: whoever knows it reads all others as before, also those
    # of its group, and so does who finds it anew in each step.
    for kind in (batches, guarded.GuardedBatches(batches, {216: 20 * batches.slots})):
      steps = _by_step(batches, ((e, kind[e]) for e in range(len(batches))))
      for step, chunks in steps.items():
        indices = np.concatenate([_indices(chunk) for chunk in chunks])
        is_fatal = kind is not batches and step >= 20 and read.get((step, 16)) == 216
        np.testing.assert_array_equal(indices % 100, np.setdiff1d(drawn, 16 if is_fatal else []))
        for index in indices.tolist():
          assert read.setdefault((step, index % 100), index) == index
  assert {read[step, 0] for step in range(40)} == {0, 100, 200, 300, 400}
  assert {read[step, 16] for step in range(20, 40)} > {216}


@pytest.mark.parametrize('size', [0, 1, 7, 50, 499])
@pytest.mark.parametrize('rows, processes', [(2, 1), (8, 1), (4, 2), (6, 3)])
def test_rows_and_processes_share_out_the_same_draw(rows, processes, size):
  draw = lambda step: np.sort(np.random.default_rng(step).permutation(500)[:size])
  share = rows // processes
  of_process = [
    make_batches(draw=draw, rows=rows, local_rows=range(p * share, (p + 1) * share), steps=2)
    for p in range(processes)
  ]
  for step in range(2):
    steps = [_by_step(b, ((e, b[e]) for e in range(len(b)))).get(step, []) for b in of_process]
    # All processes have as many chunks to sum, without a word to each other.
    assert len({len(chunks) for chunks in steps}) == 1
    found = [_indices(chunk) for chunks in steps for chunk in chunks]
    expected = draw(step)[draw(step) != 13]
    np.testing.assert_array_equal(np.sort(np.concatenate([*found, []])), expected)
    drawn = [sum(chunk.drawn for chunk in chunks) for chunks in steps]
    assert sum(drawn) == size and max(drawn) - min(drawn) <= share
    for chunk in itertools.chain(*steps):
      assert chunk.examples['image'].shape[:3] == chunk.mask.shape == (share, 2, 8)
      for row in range(share):
        assert not chunk.mask[row, chunk.live[row] :].any()


@pytest.mark.parametrize('size', [0, 1, 499])
def test_no_draw_is_too_small_or_too_large(size):
  """Also one far beyond what the slots were made for is delivered whole."""
  batches = make_batches(draw=lambda step: np.arange(size))
  chunks = [c for e in range(batches.slots) for c in batches[e]]
  assert sum(c.drawn for c in chunks) == size
  expected = np.delete(np.arange(size), 13) if size > 13 else np.arange(size)
  np.testing.assert_array_equal(
    np.concatenate([_indices(c) for c in chunks] or [np.empty(0, int)]), expected
  )


def test_bad_records_count_as_drawn_are_masked_and_told():
  bad = _draw(0)[[0, 5]]
  batches = make_batches(source=Numbered(bad), steps=1)
  chunks = [c for e in range(len(batches)) for c in batches[e]]
  missing = len(set(bad) | ({13} & set(_draw(0))))
  assert sum(c.bad for c in chunks) == missing
  assert sum(c.drawn for c in chunks) == len(_draw(0))
  assert sum(c.mask.sum() for c in chunks) == len(_draw(0)) - missing
  assert f'record {bad[0]}: made bad' in [r for c in chunks for r in c.reasons]
  for chunk in chunks:
    assert not chunk.examples['image'][~chunk.mask].any()


@pytest.mark.parametrize('views', [1, 3])
def test_what_a_record_gives_does_not_depend_on_the_others(views):
  """With others bad, or not drawn, or in other rows and chunks, all of it is the same."""
  fields = ('image', 'key', 'label')

  def examples(**settings):
    batches = make_batches(
      steps=1, fields=fields, views=views, pad_crop=1, color_jitter=(0.4,) * 5, **settings
    )
    chunks = [c for e in range(len(batches)) for c in batches[e]]
    kept = {name: [c.examples[name][c.mask] for c in chunks] for name in fields}
    kept = {name: np.concatenate(x) for name, x in kept.items()}
    # Keys are as good as names.
    return {key.tobytes(): [kept[name][i] for name in fields] for i, key in enumerate(kept['key'])}

  drawn = _draw(0)
  whole = examples()
  assert len(whole) == len(drawn)
  for settings, missing in (
    ({'source': Numbered(drawn[[0, 7]])}, 2),
    ({'draw': lambda step: np.delete(drawn, [0, 7])}, 2),
    ({'rows': 3, 'per_chunk': 1}, 0),
  ):
    found = examples(**settings)
    assert found.keys() <= whole.keys() and len(found) == len(whole) - missing
    for key, values in found.items():
      for a, b in zip(values, whole[key], strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_of_several_captions_is_drawn_for_each_step_and_replayed():
  class Several(Numbered):
    def __getitem__(self, index):
      return {**super().__getitem__(index), 'caption': [f'a{index}', f'b{index}']}

  batches = make_batches(source=Several(), draw=functools.partial(_draw, size=20))
  tokenizer = BytesTokenizer()

  def captions(step):
    elements = range(step * batches.slots, (step + 1) * batches.slots)
    chunks = [chunk for element in elements for chunk in batches[element]]
    return [tokenizer.decode(row) for c in chunks for row in c.examples['tokens'][c.mask]]

  seen = [captions(step) for step in range(10)]
  assert {text[0] for texts in seen for text in texts} == {'a', 'b'}
  assert len({tuple(text[0] for text in texts) for texts in seen}) == 10
  assert seen == [captions(step) for step in range(10)]


def test_the_sampling_key_does_not_show():
  sampler = PoissonSampler(_N, 60, (1234567890123, 9876543210987))
  rng = functools.partial(augmentation_generator, sampler.key)
  batches = dataclasses.replace(make_batches(), draw=sampler.draw, augmentation_rng=rng)
  assert '1234567890123' not in repr(batches) and '9876543210987' not in repr(batches)


def test_evaluation_batches_hold_all_images_in_order():
  transform = data.Transform(4, 8, BytesTokenizer())
  batches = pipeline.EvaluationBatches(Numbered([2]), transform, 64)
  parts = [batches[e] for e in range(len(batches))]
  labels = np.concatenate([p.labels for p in parts])
  expected = np.arange(_N) % 2
  expected[2] = -1
  np.testing.assert_array_equal(labels, expected)
  assert [len(p.images) for p in parts] == [64] * 7 + [_N - 7 * 64]
  assert parts[1].images[3, 0, 0, 1] == 67
