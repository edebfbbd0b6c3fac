"""The benchmark runs, says what it should, and reads traces right; no time is asserted."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from dpcap.privacy import CLIPPING_STRATEGIES
from tools import bench_clipping
from tools.bench_parts import cases, hlo, timing, trace

TINY = ('--size=micro', '--image_size=16', '--batch=2', '--vocab=32', '--text_length=6')
QUICK = (*TINY, '--rounds=2', '--warmup=1', '--clip_norm=1e9')
CONTRACT = {'strategy', 'median_s', 'ratio_to_plain', 'temp_mb', 'flops_g', 'device'}
CASE = cases.make_case(
  size='micro', depth=None, image_size=16, batch=2, vocab=32, dtype='float32', text_length=6
)


def silent(text):
  del text


def run(capsys, *arguments):
  """Exit status, JSON lines and stderr of the program."""
  status = bench_clipping.main(list(arguments))
  out, err = capsys.readouterr()
  return status, [json.loads(line) for line in out.splitlines()], err


def out_of_memory():
  raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')


# -- the program


def test_a_line_per_strategy_and_a_table(capsys):
  status, lines, err = run(capsys, *QUICK)
  assert status == 0
  assert [line['strategy'] for line in lines] == ['plain', *CLIPPING_STRATEGIES]
  for line in lines:
    assert line.keys() >= CONTRACT
    assert line.keys() == lines[0].keys()
    assert line['error'] is None
    assert all(line[key] > 0 for key in ('median_s', 'ratio_to_plain', 'temp_mb', 'flops_g'))
    low, high = line['ratio_quartiles']
    assert low <= line['ratio_to_plain'] <= high
    assert (line['batch'], line['depth'], line['dtype']) == (2, 1, 'float32')
    assert line['strategy'] in err
  assert lines[0]['ratio_to_plain'] == 1


def test_only_the_strategies_asked_for(capsys):
  _, lines, _ = run(capsys, *QUICK, '--strategies=vmap')
  assert [line['strategy'] for line in lines] == ['vmap']
  assert lines[0]['ratio_to_plain'] is None
  assert lines[0]['median_s'] > 0


def test_lists_are_swept_as_a_product():
  sweep = ('--batch=1,2', '--dtype=float32,bfloat16', '--image_size=16,24', '--depth=1,3')
  swept = bench_clipping.list_cases(bench_clipping.parse([*TINY, *sweep]))
  assert len(set(swept)) == 2**4
  assert {case.image_size for case in swept} == {16, 24}
  assert {(case.batch, case.depth, case.dtype) for case in swept} == {
    (batch, depth, dtype)
    for batch in (1, 2)
    for depth in (1, 3)
    for dtype in ('float32', 'bfloat16')
  }


def test_each_combination_is_a_group_of_lines(capsys):
  _, lines, err = run(capsys, *QUICK, '--batch=2,1', '--strategies=plain')
  assert [(line['strategy'], line['batch']) for line in lines] == [('plain', 2), ('plain', 1)]
  assert err.count('micro, encoder of depth 1') == 2


def test_depth_is_the_encoders():
  inputs = jax.eval_shape(lambda: cases.make_inputs(CASE._replace(depth=3)))
  blocks = [name for name in inputs.variables['params']['encoder'] if name.startswith('block_')]
  assert sorted(blocks) == ['block_0', 'block_1', 'block_2']


@pytest.mark.parametrize(
  ('option', 'named'),
  [
    ('--strategies=plain,foo', "'foo'.*vmap"),
    ('--size=huge', '--size.*huge.*micro'),
    ('--image_size=20', '--image_size=20.*multiple'),
    ('--dtype=float16', '--dtype.*float16.*bfloat16'),
    ('--batch=0', "--batch='0'.*at least 1"),
    ('--batch=max', '--batch=max.*accelerator'),
    ('--batch=', '--batch'),
    ('--vocab=x', "--vocab='x'"),
    ('--depth=0', '--depth'),
    ('--text_length=1', '--text_length.*at least 2'),
    ('--rounds=0', '--rounds'),
    ('--warmup=0', '--warmup'),
    ('--clip_norm=nan', '--clip_norm.*nan.*finite'),
    ('--unknown=1', '--unknown'),
  ],
)
def test_wrong_options_are_refused_in_one_line(capsys, option, named):
  status, lines, err = run(capsys, *TINY, option)
  assert (status, lines) == (2, [])
  assert err.startswith('error: ') and err.count('\n') == 1
  assert re.search(named, err)


def test_what_does_not_fit_is_reported_and_the_rest_goes_on(capsys, monkeypatch):
  make_step = cases.make_step

  def failing(case, strategy, clip_norm):
    return make_step(case, strategy, clip_norm) if strategy == 'plain' else out_of_memory()

  monkeypatch.setattr(timing, 'make_step', failing)
  status, (failed, plain), err = run(capsys, *QUICK, '--strategies=vmap,plain', '--profile')
  assert status == 0
  assert failed['error'] == 'out of memory'
  measured = CONTRACT - {'strategy', 'device'}
  assert all(failed[key] is None for key in measured)
  assert plain['error'] is None and plain['median_s'] > 0
  assert 'out of memory' in err


# -- timing


def test_interleaved_and_a_program_out_of_memory_drops_out():
  order = []

  def program(name, fail=False):
    return timing.Program(lambda: out_of_memory() if fail else order.append(name), None, 0.0)

  programs = {'a': program('a'), 'b': program('b'), 'full': program('full', True)}
  seconds = timing.run_rounds(programs, rounds=6, warmup=2, say=silent)
  assert {name: len(s) for name, s in seconds.items()} == {'a': 6, 'b': 6}
  rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
  assert set(rounds) == {('a', 'b'), ('b', 'a')}


def test_other_errors_are_not_taken_for_memory():
  def broken():
    raise ValueError('a bug')

  with pytest.raises(ValueError, match='a bug'):
    timing.run_rounds({'a': timing.Program(broken, None, 0.0)}, 1, 1, silent)


@pytest.mark.parametrize(('limit', 'found'), [(3, 8), (8, 8), (100, 96), (128, 128), (135, 128)])
def test_the_largest_batch_is_found(limit, found):
  tried = []

  def fits(batch):
    tried.append(batch)
    return batch <= limit

  assert timing.largest_batch(fits) == found
  assert len(tried) == len(set(tried)) <= 10


def test_the_largest_batch_is_what_runs(monkeypatch):
  monkeypatch.setattr(timing, 'BATCH_MULTIPLE', 2)
  monkeypatch.setattr(timing, 'fits', lambda case, *_: case.batch <= 3)
  options = bench_clipping.parse([*QUICK, '--strategies=plain'])
  (line,), _ = bench_clipping.run_case(CASE._replace(batch=None), options, silent)
  assert line['batch'] == 2
  assert line['images_per_s'] > 0


def test_fits(monkeypatch):
  assert timing.fits(CASE, ['plain'], 1.0, silent)
  monkeypatch.setattr(timing, 'make_inputs', lambda case: out_of_memory())
  assert not timing.fits(CASE, ['plain'], 1.0, silent)


def test_plain_is_the_mean_of_what_the_strategies_sum():
  inputs = cases.make_inputs(CASE)
  mean, losses = jax.jit(cases.make_step(CASE, 'plain', 1e9))(*inputs)
  unclipped = jax.jit(cases.make_step(CASE, 'vmap', 1e9))(*inputs)
  assert jnp.allclose(losses, unclipped.losses, rtol=1e-5)
  same = jax.tree.map(lambda m, s: jnp.allclose(2 * m, s, atol=1e-5), mean, unclipped.sum)
  assert all(jax.tree.leaves(same))


def test_peaks_are_of_the_chip_named():
  assert timing.peak_gflops('NVIDIA L40S') == 362e3
  assert timing.peak_gflops('NVIDIA H100 80GB HBM3') == 989e3
  assert timing.peak_gflops('NVIDIA A100-SXM4-80GB') == 312e3
  assert timing.peak_gflops('TPU v5 lite') == 197e3
  assert timing.peak_gflops('cpu') is None


# -- where the time goes


def test_profile_on_screen_and_in_the_line(capsys):
  _, (line,), err = run(capsys, *QUICK, '--strategies=plain', '--profile')
  assert line['profile']['kinds_ms'].keys() >= {'dot', 'elementwise', 'reduce'}
  assert line['profile']['wall_ms'] > 0
  # Which of the places are among the first ones is a matter of microseconds.
  assert re.search(r'backward (encoder|decoder)/block_\*/', err)


def test_profile_accounts_for_every_operation_once():
  def step(x):
    def body(_, x):
      return jnp.tanh(x @ x)

    return jax.lax.fori_loop(0, 5, body, x)

  x = jnp.ones((200, 200)) / 200
  compiled = jax.jit(step).lower(x).compile()
  jax.block_until_ready(compiled(x))
  operations = hlo.read_operations(compiled.as_text())
  profile = trace.take_profile(lambda: compiled(x), operations, steps=2)
  kinds = {row.kind: row for row in trace.sum_rows(profile.rows, lambda row: row.kind)}
  # What XLA counts once for a loop is counted each time that it runs.
  assert kinds[hlo.DOT].calls == 5
  assert kinds[hlo.DOT].flops == 5 * 2 * 200**3
  assert kinds[hlo.DOT].origin.endswith('dot_general')
  assert 0 < sum(row.ms for row in profile.rows) < profile.wall_ms * 64
  assert all(row.ms >= 0 for row in profile.rows)


def mark(time, action, thread, token, value=None):
  return time, action, thread, token, value


def test_time_is_the_innermost_operations_and_tasks_are_who_queued_them():
  marks = [
    mark(0, trace._START, 'main', 1, 'loop'),
    mark(10, trace._START, 'main', 2, 'dot'),
    mark(15, trace._QUEUE, 'main', 3, 'task'),
    mark(20, trace._START_TASK, 'worker', 1, 'task'),
    mark(25, trace._START, 'worker', 2, 'other'),
    mark(30, trace._START, 'main', 4, trace.WAITING),
    mark(35, trace._END, 'worker', 2, 'other'),
    mark(60, trace._STOP_TASK, 'worker', 3),
    mark(60, trace._END, 'main', 4, trace.WAITING),
    mark(60, trace._END, 'main', 2, 'dot'),
    mark(70, trace._END, 'main', 1, 'loop'),
  ]
  nanoseconds, calls = trace._self_times(marks)
  dot = (30 - 10) + (25 - 20) + (60 - 35)
  assert nanoseconds == {'loop': 20, 'dot': dot, 'other': 10, trace.WAITING: 30}
  assert calls['dot'] == calls['loop'] == 1


HLO = """HloModule jit_f, is_scheduled=true

%fused_computation (param_0: f32[4,8], param_1: f32[8,3]) -> f32[4,3] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %param_1 = f32[8,3]{1,0} parameter(1)
  %dot.1 = f32[4,3]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(M.loss))/M.memory/e/block_3/dot"}
  ROOT %tanh.1 = f32[4,3]{1,0} tanh(%dot.1), metadata={op_name="jit(f)/tanh"}
}

%moves (p: f32[4,3]) -> bf16[3,4] {
  %p = f32[4,3]{1,0} parameter(0)
  %transpose.2 = f32[3,4]{0,1} transpose(%p), dimensions={1,0}
  ROOT %convert.2 = bf16[3,4]{1,0} convert(%transpose.2)
}

ENTRY %main (a: f32[4,8], b: f32[8,3]) -> bf16[3,4] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %b = f32[8,3]{1,0} parameter(1)
  %my_fusion.7 = f32[4,3]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_computation
  %gemm.5 = (f32[4,3]{1,0}, s8[64]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %sum.4 = f32[4]{0} reduce(%my_fusion.7, %a), dimensions={1}, to_apply=%add
  ROOT %copy_fusion = bf16[3,4]{1,0} fusion(%my_fusion.7), kind=kLoop, calls=%moves
}
"""


def test_operations_are_told_by_what_is_inside():
  operations = hlo.read_operations(HLO)
  origin = 'jit(f)/transpose(jvp(M.loss))/M.memory/e/block_3/dot'
  assert operations['my_fusion.7'] == hlo.Operation(hlo.DOT, origin, 2 * 4 * 8 * 3)
  assert operations['gemm.5'] == hlo.Operation(hlo.DOT, '', 2 * 4 * 8 * 3)
  assert operations['sum.4'].kind == hlo.REDUCE
  assert operations['copy_fusion'] == hlo.Operation(hlo.COPY, '', 0)


def test_kernels_that_xla_spelled_otherwise_are_found():
  operations = hlo.read_operations(HLO)
  kinds = {
    name: trace._row(name, 1.0, 1.0, operations).kind
    for name in ('my_fusion_7', 'sm90_xmma_gemm_f32', 'MemcpyD2D', 'who_knows')
  }
  assert list(kinds.values()) == [hlo.DOT, hlo.DOT, hlo.COPY, hlo.OTHER]


def test_place():
  row = trace._row('my_fusion.7', 1.0, 1.0, hlo.read_operations(HLO))
  assert trace.place(row) == 'backward e/block_3/dot'
  assert trace.place_in_any_block(row) == 'backward e/block_*/dot'
  assert trace.place(row._replace(origin='', name='wrapped_copy.12')) == 'wrapped_copy'
