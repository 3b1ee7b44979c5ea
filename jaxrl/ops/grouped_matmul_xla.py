"""Grouped matmul in plain XLA operations, for the CPU: a loop over experts, and over their rows.

Rows of an expert are taken BLOCK at a time, and what is left over SMALL at a time. A block may
reach into the rows of the next experts: forward and for dx those results are overwritten by the
next block, in the order of the rows; for dw they are multiplied by zeros. So memory is linear, and
the work is that of the rows, plus half a small block per expert.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK, SMALL = 128, 32
# What loops over blocks are called in a compiled program, which does not know how long they are.
WHOLE, REST = "grouped_matmul_blocks", "grouped_matmul_rest"


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M N"]:
    """Rows times their expert's weights, in the dtype of x, whatever the dtype of w; sums in fp32.

    x holds group_sizes[0] rows of expert 0, then those of expert 1, ...; rows beyond all groups
    yield zeros. The gradient of w has the dtype of w and is not rounded to that of x.
    """
    return _rows(x, w, group_sizes, "MK,KN->MN")


def _forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, dy):
    x, w, group_sizes = residuals
    dy = dy.astype(x.dtype)
    return _rows(dy, w, group_sizes, "MN,KN->MK"), _weights(x, dy, group_sizes, w.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _over_blocks(start, size, M, body, carry):
    """body(first row, block, carry) over blocks of a group's rows, from `start` on."""
    big, small = min(BLOCK, M), min(SMALL, M)
    whole = size // big
    with jax.named_scope(WHOLE):
        carry = jax.lax.fori_loop(0, whole, lambda i, c: body(start + i * big, big, c), carry)
    start, left = start + whole * big, size - whole * big
    with jax.named_scope(REST):
        return jax.lax.fori_loop(
            0, -(-left // small), lambda i, c: body(start + i * small, small, c), carry
        )


def _starts(group_sizes):
    return jnp.cumsum(group_sizes) - group_sizes


def _padded(x):
    # A last block may reach behind the last row: a slice there would be moved, not cut.
    return jnp.pad(x, ((0, min(SMALL, x.shape[0])), (0, 0)))


def _rows(x, w, group_sizes, product):
    M, E = x.shape[0], w.shape[0]
    padded = _padded(x)
    multiply = functools.partial(jnp.einsum, product, preferred_element_type=jnp.float32)
    width = jax.eval_shape(multiply, x, w[0]).shape[1]
    starts = _starts(group_sizes)

    def expert(e, out):
        mine = w[e].astype(x.dtype)

        def block(first, rows, out):
            part = multiply(jax.lax.dynamic_slice_in_dim(padded, first, rows), mine)
            return jax.lax.dynamic_update_slice_in_dim(out, part.astype(x.dtype), first, 0)

        return _over_blocks(starts[e], group_sizes[e], M, block, out)

    out = jnp.zeros((padded.shape[0], width), x.dtype)
    out = jax.lax.fori_loop(0, E, expert, out)[:M]
    return jnp.where((jnp.arange(M) < jnp.sum(group_sizes))[:, None], out, 0)


def _weights(x, dy, group_sizes, dtype):
    M = x.shape[0]
    x, dy = _padded(x), _padded(dy)
    ends = jnp.cumsum(group_sizes)

    def expert(e):
        def block(first, rows, total):
            mine = (first + jnp.arange(rows) < ends[e])[:, None]
            here = jnp.where(mine, jax.lax.dynamic_slice_in_dim(dy, first, rows), 0)
            there = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, first, rows), 0)
            # Transposed apart: XLA's CPU product runs at half speed where it contracts the first
            # dimension of both sides, and would take the transposition in.
            there = jax.lax.optimization_barrier(there.T)
            return total + jnp.matmul(there, here, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        start = ends[e] - group_sizes[e]
        return _over_blocks(start, group_sizes[e], M, block, zeros).astype(dtype)

    return jax.lax.map(expert, jnp.arange(group_sizes.shape[0]))
