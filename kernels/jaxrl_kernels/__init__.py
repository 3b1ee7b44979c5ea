"""GPU kernels for training language models in JAX: flash attention and grouped matmul.

Depends on jax, jax-triton and triton only; the last two are imported when a kernel is called.
"""
