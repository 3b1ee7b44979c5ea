"""Grouped matmul in plain XLA operations, for the CPU: a loop over experts, and over their rows.

Rows of an expert are taken in blocks, the largest that fit first; only its last block, of the
smallest kind, may reach into the rows of the next experts, or be moved back where it would reach
behind the last row: there, what is not the expert's is masked. So memory is linear, and the work is
that of the rows, plus half a smallest block per expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK, SMALLER = 256, (128, 64, 32, 16)
# What loops over blocks are called in a compiled program, which does not know how long they are.
WHOLE, REST = "grouped_matmul_blocks", "grouped_matmul_rest"


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M N"]:
    """Rows times their expert's weights, in the dtype of x, whatever the dtype of w; sums in fp32.

    x holds group_sizes[0] rows of expert 0, then those of expert 1, ...; rows beyond all groups
    yield zeros. The gradient of w has the dtype of w and is not rounded to that of x. Raises
    ValueError where a side is 0.
    """
    return _rows(x, (w,), group_sizes)


def _forward(x, w, group_sizes):
    return grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(residuals, dy):
    x, w, group_sizes = residuals
    dy = dy.astype(x.dtype)
    (dw,) = _weights(x, dy, group_sizes, (w,))
    return _rows(dy, (w,), group_sizes, transposed=True), dw, None


grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def grouped_swiglu(
    x: Float[Array, "M K"],
    w_gate: Float[Array, "E K N"],
    w_up: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "M N"]:
    """silu(x w_gate[e]) * (x w_up[e]), in one pass over the rows each way; else as above."""
    return swiglu(_rows(x, (w_gate, w_up), group_sizes))


def swiglu(both):
    """silu(gate) * up of both side by side."""
    gate, up = jnp.split(both, 2, axis=1)
    return jax.nn.silu(gate) * up


def _swiglu_forward(x, w_gate, w_up, group_sizes):
    both = _rows(x, (w_gate, w_up), group_sizes)
    return swiglu(both), (x, w_gate, w_up, group_sizes, both)


def _swiglu_backward(residuals, dy):
    x, w_gate, w_up, group_sizes, both = residuals
    (dboth,) = jax.vjp(swiglu, both)[1](dy.astype(x.dtype))
    dw_gate, dw_up = _weights(x, dboth, group_sizes, (w_gate, w_up))
    return _rows(dboth, (w_gate, w_up), group_sizes, transposed=True), dw_gate, dw_up, None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _over_blocks(start, size, M, body, carry):
    """body(first row, block, whether rows may be another's, carry) over a group's rows."""
    for level in (BLOCK, *SMALLER[:-1]):
        block = min(level, M)
        whole = size // block
        with jax.named_scope(WHOLE if level == BLOCK else REST):
            carry = jax.lax.fori_loop(
                0, whole, lambda i, c, s=start, b=block: body(s + i * b, b, False, c), carry
            )
        start, size = start + whole * block, size - whole * block
    last = min(SMALLER[-1], M)
    with jax.named_scope(REST):
        return jax.lax.fori_loop(
            0, -(-size // last), lambda i, c: body(start + i * last, last, True, c), carry
        )


def _mine(first, block, end, M):
    """Where a block that must not reach behind row M is read, and which of its rows count."""
    at = jnp.minimum(first, M - block)
    rows = at + jnp.arange(block)
    return at, ((rows >= first) & (rows < end))[:, None]


def _sizes_and_ends(group_sizes):
    """In int32: sums of small integers would overflow."""
    group_sizes = group_sizes.astype(jnp.int32)
    return group_sizes, jnp.cumsum(group_sizes)


def _rows(x, ws, group_sizes, *, transposed=False):
    """x times each expert's ws side by side; transposed: x times the transpose of that."""
    M, E = x.shape[0], ws[0].shape[0]
    if 0 in (*x.shape, *ws[0].shape):
        raise ValueError(f"x {x.shape} and w {ws[0].shape}: no side may be 0")
    width = ws[0].shape[1] if transposed else sum(w.shape[2] for w in ws)
    group_sizes, ends = _sizes_and_ends(group_sizes)

    def expert(e, out):
        mine = jnp.concatenate([w[e].astype(x.dtype) for w in ws], axis=1)

        def block(first, rows, shared, out):
            at, counts = _mine(first, rows, ends[e], M)
            part = jax.lax.dot_general(
                jax.lax.dynamic_slice_in_dim(x, at, rows),
                mine,
                (((1,), (1 if transposed else 0,)), ((), ())),
                preferred_element_type=jnp.float32,
            ).astype(x.dtype)
            if shared:
                part = jnp.where(counts, part, jax.lax.dynamic_slice_in_dim(out, at, rows))
            return jax.lax.dynamic_update_slice_in_dim(out, part, at, 0)

        return _over_blocks(ends[e] - group_sizes[e], group_sizes[e], M, block, out)

    return jax.lax.fori_loop(0, E, expert, jnp.zeros((M, width), x.dtype))


def _weights(x, dy, group_sizes, ws):
    """The gradients of ws, whose results stand side by side in dy."""
    M = x.shape[0]
    group_sizes, ends = _sizes_and_ends(group_sizes)
    splits = [sum(w.shape[2] for w in ws[:i]) for i in range(1, len(ws))]

    def expert(e):
        def block(first, rows, shared, total):
            at, counts = _mine(first, rows, ends[e], M)
            here = jax.lax.dynamic_slice_in_dim(dy, at, rows)
            there = jax.lax.dynamic_slice_in_dim(x, at, rows)
            if shared:
                here, there = jnp.where(counts, here, 0), jnp.where(counts, there, 0)
            # Transposed apart: XLA's CPU product runs at half speed where it contracts the first
            # dimension of both sides, and would take the transposition in.
            there = jax.lax.optimization_barrier(there.T)
            return total + jnp.matmul(there, here, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        total = _over_blocks(ends[e] - group_sizes[e], group_sizes[e], M, block, zeros)
        parts = jnp.split(total, splits, axis=1)
        return tuple(part.astype(w.dtype) for part, w in zip(parts, ws, strict=True))

    return jax.lax.map(expert, jnp.arange(group_sizes.shape[0]))
