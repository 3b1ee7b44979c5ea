"""Every test runs on CPU, split into eight virtual devices."""

import os

# Tests compile far more than they compute: leave LLVM's expensive passes out.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_prefer_vector_width=128 " + os.environ.get("XLA_FLAGS", "")
)

import jaxrl  # noqa: F401, I001  (before jax: it keeps a CUDA plugin without GPU quiet)

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
