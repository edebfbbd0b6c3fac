"""How tests compile: as a user does, or in a quarter of the time."""

import contextlib
import functools

import jax

# What a user gets; tests in general are compiled without it (tests/conftest.py).
AT_LEISURE = {
  'xla_backend_optimization_level': 3,
  'xla_llvm_disable_expensive_passes': False,
  'xla_cpu_use_fusion_emitters': True,
}


@functools.cache
def haste():
  """Compiler options that save three quarters of the time, those of them that jaxlib knows."""
  options = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
    'xla_cpu_use_fusion_emitters': False,
    'xla_cpu_parallel_codegen_split_count': 1,
  }

  def is_known(name):
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.jit(lambda x: x, compiler_options={name: options[name]}).lower(0).compile()
      return True

  return {name: value for name, value in options.items() if is_known(name)}
