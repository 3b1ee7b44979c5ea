"""Grouped products group by group in plain JAX and fp32: what the kernels are tested against."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_kernels.grouped_matmul import arguments


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """As `jaxrl_kernels.grouped_matmul.triton.grouped_matmul`: E full products, all but one group's
    rows of each thrown away."""
    arguments.check(x, group_sizes, w=w)
    group_sizes = group_sizes.astype(jnp.int32)  # sums of small integers would overflow
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    out = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for e in range(w.shape[0]):
        mine = (row >= ends[e] - group_sizes[e]) & (row < ends[e])
        # Rows of others are dropped before the product: not-a-numbers among them must not spread.
        rows = jnp.where(mine, x.astype(jnp.float32), 0.0)
        out += jnp.matmul(rows, w[e].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def grouped_lora_matmul(x: Array, w: Array, a: Array, b: Array, group_sizes: Array) -> Array:
    """As the Triton one, rounding nowhere but at the end."""
    exact = x.astype(jnp.float32)
    low_rank = grouped_matmul(grouped_matmul(exact, a, group_sizes), b, group_sizes)
    return (grouped_matmul(exact, w, group_sizes) + low_rank).astype(x.dtype)


def grouped_swiglu(x: Array, w_gate: Array, w_up: Array, group_sizes: Array) -> Array:
    """As the Triton one, rounding nowhere but at the end."""
    exact = x.astype(jnp.float32)
    gate = grouped_matmul(exact, w_gate, group_sizes)
    return (jax.nn.silu(gate) * grouped_matmul(exact, w_up, group_sizes)).astype(x.dtype)
