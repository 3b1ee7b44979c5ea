"""The grouped products' reference and its gradients against fp64, the calculus done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels.grouped_matmul import reference

SIZES = {  # of the groups; M is 60: some have rows behind
    "uneven": (3, 30, 20, 7),
    "empty": (0, 33, 0, 0, 11, 0),
    "one_giant": (0, 0, 58, 2),
    "nothing": (0, 0),
}
M, K, N, R = 60, 24, 20, 8


def grouped_matmul(x, dy, w):
    """(y, dx, dw) of the rows x of one expert; so below."""
    return x @ w, dy @ w.T, x.T @ dy


def grouped_lora_matmul(x, dy, w, a, b):
    dxa = dy @ b.T
    return x @ w + x @ a @ b, dy @ w.T + dxa @ a.T, x.T @ dy, x.T @ dxa, (x @ a).T @ dy


def grouped_swiglu(x, dy, w_gate, w_up):
    gate, up = x @ w_gate, x @ w_up
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    dgate, dup = dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu
    return silu * up, dgate @ w_gate.T + dup @ w_up.T, x.T @ dgate, x.T @ dup


BY_HAND = {f.__name__: f for f in (grouped_matmul, grouped_lora_matmul, grouped_swiglu)}


def weights(op, E, rng):
    shapes = {
        "grouped_matmul": [(E, K, N)],
        "grouped_lora_matmul": [(E, K, N), (E, K, R), (E, R, N)],
        "grouped_swiglu": [(E, K, N)] * 2,
    }[op]
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("op", BY_HAND)
def test_reference_and_its_gradients(op, case, dtype):
    """fp32 throughout: what is bf16 is rounded once, at the end, and the weights' gradients not."""
    rng, sizes = np.random.default_rng(0), SIZES[case]
    x, dy = (jnp.asarray(rng.standard_normal((M, n)), dtype) for n in (K, N))
    ws = weights(op, len(sizes), rng)
    y, vjp = jax.vjp(lambda x, *ws: getattr(reference, op)(x, *ws, jnp.array(sizes)), x, *ws)
    got = y, *vjp(dy)
    assert [a.dtype for a in got] == [x.dtype] * 2 + [w.dtype for w in ws]
    got = [np.asarray(a, np.float64) for a in got]
    x, dy, *ws = (np.asarray(a, np.float64) for a in (x, dy, *ws))
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        want = BY_HAND[op](x[rows], dy[rows], *(w[e] for w in ws))
        mine = (got[0][rows], got[1][rows], *(dw[e] for dw in got[2:]))
        for i, (a, b) in enumerate(zip(mine, want, strict=True)):
            rounding = 2**-8 if i < 2 and dtype == "bfloat16" else 0.0  # of each number
            limit = rounding * np.abs(b) + 2**-20 * np.max(np.abs(b), initial=0.0)
            assert np.all(np.abs(a - b) <= limit), (e, i)
        start += size
    assert not got[0][start:].any() and not got[1][start:].any()
