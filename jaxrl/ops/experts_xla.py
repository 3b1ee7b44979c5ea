"""An expert layer in plain XLA operations, for the CPU: tokens in, tokens out, expert by expert.

What `grouped_matmul_xla` does product by product, in one loop each way: an expert's tokens are
gathered, go through its gated MLP, and their results are stored, so that of all rows only gate, up
and results are ever written. A block has the size of an expert's rows, rounded up to one of a few:
each product runs once per expert, for packing its weights costs more than the rows added. Memory is
linear, in the rows and one block.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxrl_kernels.permute import Routing, unpermute
from jaxtyping import Array, Float

from jaxrl.ops.grouped_matmul_xla import BLOCK, REST, WHOLE, swiglu

# Rows from one size of a block to the next; coarser, for quicker compilation, with fewer than MANY.
STEP, MANY = 32, 4096
IN_BOUNDS = "promise_in_bounds"  # the tokens of a routing


@jax.custom_vjp
def experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    routing: Routing,
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """Each token's sum, by `weights`, of its experts' (silu(x w_gate) * (x w_up)) w_down.

    Products in the dtype of x, sums in fp32. The gradients of the experts' weights have their dtype
    and are not rounded to that of x; the gradient of `weights` is exact also where a weight is 0.
    Choices that `routing` dropped count for nothing. Raises ValueError where a side is 0.
    """
    return _forward(x, weights, routing, w_gate, w_up, w_down)[0]


def _forward(x, weights, routing, w_gate, w_up, w_down):
    if 0 in (*weights.shape, *w_gate.shape):
        raise ValueError(f"weights {weights.shape} and w_gate {w_gate.shape}: no side may be 0")
    rows = _Rows(routing)
    F, D = w_down.shape[1:]

    def expert(e, carry):
        w, down = _side_by_side(x, w_gate, w_up, e), w_down[e].astype(x.dtype)

        def block(first, count, carry, *, fresh):
            both, out = carry
            here = x.at[rows.token(first, count)].get(mode=IN_BOUNDS)
            if fresh:  # rows behind the expert's are another's, or dropped
                here = jnp.where(rows.valid(e, first, count), here, 0)
            mine = _dot(here, w, 1, 0).astype(x.dtype)
            result = _dot(swiglu(mine), down, 1, 0).astype(x.dtype)
            return _store(both, mine, first), _store(out, result, first)

        return rows.visit(e, block, carry)

    carry = _zeros((rows.room, 2 * F), x.dtype), _zeros((rows.room, D), x.dtype)
    both, out = lax.fori_loop(0, w_gate.shape[0], expert, carry)
    y = unpermute(out, jnp.where(rows.kept, weights, 0), routing)
    return y, (x, weights, routing, w_gate, w_up, w_down, both)


def _backward(residuals, dy):
    x, weights, routing, w_gate, w_up, w_down, both = residuals
    rows = _Rows(routing)
    D = w_down.shape[2]
    dy = dy.astype(x.dtype)
    weight = weights.reshape(-1)[routing.slot].astype(jnp.float32)  # [T, k] -> [T k]
    weight = jnp.pad(weight, (0, rows.room - weight.size))[:, None]

    def expert(e, carry):
        w, down = _side_by_side(x, w_gate, w_up, e), w_down[e].astype(x.dtype)

        def block(first, count, carry, *, fresh):
            dx, dweight, *totals = carry
            token, valid = rows.token(first, count), rows.valid(e, first, count)
            here, there = (a.at[token].get(mode=IN_BOUNDS) for a in (dy, x))
            if fresh:
                here, there = (jnp.where(valid, a, 0) for a in (here, there))
            mine = lax.dynamic_slice_in_dim(weight, first, count)
            h, pull_back = jax.vjp(swiglu, lax.dynamic_slice_in_dim(both, first, count))
            dh = _dot(here, down, 1, 1)  # not weighted yet
            dweight = _store(dweight, jnp.sum(h.astype(jnp.float32) * dh, axis=1), first)
            (dmine,) = pull_back((dh * mine).astype(x.dtype))
            # What stands behind the expert's rows is another's: nothing of it may enter a sum.
            dmine = jnp.where(valid, dmine, 0)
            h = jnp.where(valid, h * mine, 0).astype(x.dtype)
            dx = _store(dx, _dot(dmine, w, 1, 1).astype(x.dtype), first)
            dw = _dot(there, dmine, 0, 0)
            parts = (*jnp.split(dw, 2, axis=1), _dot(h, here, 0, 0))
            sums = parts if fresh else (t[e] + p for t, p in zip(totals, parts, strict=True))
            put = lax.dynamic_update_index_in_dim
            return dx, dweight, *(put(t, p, e, 0) for t, p in zip(totals, sums, strict=True))

        return rows.visit(e, block, carry)

    carry = [_zeros((rows.room, D), x.dtype), _zeros((rows.room,), jnp.float32)]
    carry += [_zeros(w.shape, jnp.float32) for w in (w_gate, w_up, w_down)]
    drows, dweight, *dexperts = lax.fori_loop(0, w_gate.shape[0], expert, tuple(carry))
    dx = jnp.zeros((), jnp.float32)
    for j in range(weights.shape[1]):  # a sum over each token's rows, in the order of its choices
        mine = drows[routing.row[:, j]].astype(jnp.float32)
        dx += jnp.where(rows.kept[:, j, None], mine, 0)
    dweight = jnp.where(rows.kept, dweight[routing.row], 0).astype(weights.dtype)
    ws = (w_gate, w_up, w_down)
    dws = (total.astype(w.dtype) for total, w in zip(dexperts, ws, strict=True))
    return dx.astype(x.dtype), dweight, None, *dws


experts.defvjp(_forward, _backward)


class _Rows:
    """The rows of a routing, and the blocks in which they are visited.

    `room`: rows of arrays whose blocks may reach behind the last row. What a block stores behind
    its expert's rows is overwritten by the next expert's, or lies behind all rows. `kept`: [T, k],
    which choices have a row.
    """

    def __init__(self, routing: Routing):
        M = routing.token.size
        self.ends = jnp.cumsum(routing.group_sizes)
        self.sizes = routing.group_sizes
        self.kept = routing.row < self.ends[-1]
        self.block = min(BLOCK, M)
        step = STEP if M >= MANY else -(-self.block // 2)
        most = min(M, 2 * self.block - 1)  # rows that are left after the whole blocks
        self.steps = [step * (i + 1) for i in range(-(-most // step))]
        self.room = M + self.steps[-1]
        self.tokens = jnp.pad(routing.token, (0, self.steps[-1]))

    def token(self, first, count):
        return lax.dynamic_slice_in_dim(self.tokens, first, count)

    def valid(self, e, first, count):
        return (first + jnp.arange(count) < self.ends[e])[:, None]

    def visit(self, e, body, carry):
        """body(first row, static count, carry, fresh=) over an expert's rows: first the last one or
        two blocks in one (fresh), which may reach behind them, then whole blocks before it."""
        size, start = self.sizes[e], self.ends[e] - self.sizes[e]
        whole = jnp.maximum(size // self.block - 1, 0)
        first = start + whole * self.block
        rest, step = size - whole * self.block, self.steps[0]

        def last(_, carry):
            sizes = [lambda c, n=n: body(first, n, c, fresh=True) for n in self.steps]
            return lax.switch((rest - 1) // step, sizes, carry)

        # A loop, run once or not at all: planning knows loops by their names.
        with jax.named_scope(REST):
            carry = lax.fori_loop(0, jnp.minimum(rest, 1), last, carry)
        with jax.named_scope(WHOLE):
            block = self.block
            return lax.fori_loop(
                0, whole, lambda i, c: body(start + i * block, block, c, fresh=False), carry
            )


def _side_by_side(x, w_gate, w_up, e):
    return jnp.concatenate([w_gate[e], w_up[e]], axis=1).astype(x.dtype)  # [D, 2 F]


def _dot(a, b, axis_a, axis_b):
    contracted = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _store(array, block, first):
    return lax.dynamic_update_slice_in_dim(array, block, first, 0)


def _zeros(shape, dtype):
    """Zeros of their own: equal ones would be made once, and copied for each use."""
    return jnp.broadcast_to(lax.optimization_barrier(jnp.zeros((), dtype)), shape)
