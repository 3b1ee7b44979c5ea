"""Chunks of queries against chunks of keys: each implementation against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels.launch import interpreted

from jaxrl.ops.attention_blocks import Bounds, resolve_blocks
from jaxrl.ops.registry import Target

ANY_GPU = Target("gpu", "a GPU that no tile was tuned for", 90)


def arrays(B, T, N, K, H, dtype):
    """q, k, v, dout, and log-sum-exp and delta as of a row with more keys than the chunk's."""
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]
    lse, delta = (rng.standard_normal((B, N, T)) for _ in range(2))
    return *qkv, jnp.asarray(lse + np.log(2.0 * T), jnp.float32), jnp.asarray(delta, jnp.float32)


def across(B, T):
    """Row 0: queries' documents begin at keys T/3 and T - 2, and behind the chunk; row 1: the
    first third of the queries sees all keys, the rest none."""
    a, b = T // 3, T - 2
    first = np.stack([np.repeat((a, b, T), (a, a, T - 2 * a)), np.repeat((0, T), (a, T - a))])
    seen = (np.arange(T) >= first[..., None])[:B]  # [B, queries, keys]
    last = np.sum(seen, axis=1)  # of each key: queries before this one see it
    zero, all_of_it = np.zeros((B, T)), np.full((B, T), T)
    ranges = (first[:B], all_of_it), (zero, last)
    return Bounds(*(tuple(jnp.asarray(a, jnp.int32) for a in r) for r in ranges))


def check(implementation, target, B, T, N, K, H, dtype, causal, packed):
    q, k, v, dout, lse, delta = arrays(B, T, N, K, H, dtype)
    bounds = across(B, T) if packed else None
    results = []
    for name, on in ((implementation, target), ("reference", Target("cpu"))):
        case = {"dtype": q.dtype, "head_dim": H, "packed": packed, "seq_len": T}
        blocks = resolve_blocks(name, target=on, **case)[1]

        @jax.jit
        def run(q, k, v, dout, lse, delta, blocks=blocks):
            grads = blocks.backward(q, k, v, bounds, causal, dout, lse, delta)
            return *blocks.forward(q, k, v, bounds, causal), *grads

        out, total, *grads = run(q, k, v, dout, lse, delta)
        sees = np.asarray(total) > -1e29
        out = np.where(np.swapaxes(sees, 1, 2)[..., None], out, 0.0)
        total = np.where(sees, total, 0.0)
        results.append((sees, out, total, *grads))
    eps = float(jnp.finfo(dtype).eps)
    tolerance = 16 * eps if dtype == "float32" else eps
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert np.all(results[0][0]) == (not packed)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *(r[1:] for r in results), strict=True):
        assert a.dtype == b.dtype == jnp.float32 and a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


@pytest.mark.filterwarnings("ignore:.*encountered in (divide|log2)")  # queries that see nothing
@pytest.mark.parametrize(("causal", "packed"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_blocks(implementation, causal, packed):
    target = Target("cpu") if implementation == "xla" else ANY_GPU
    dtype = "float32" if causal else "bfloat16"
    with interpreted():
        check(implementation, target, 2, 50, 2, 1, 16, dtype, causal, packed)


def test_a_query_that_sees_no_key_gets_zeros_from_xla():
    q, k, v, *_ = arrays(2, 50, 2, 1, 16, "float32")
    case = {"dtype": q.dtype, "head_dim": 16, "packed": True, "seq_len": 50}
    blocks = resolve_blocks("xla", target=Target("cpu"), **case)[1]
    bounds = across(2, 50)
    out, lse = jax.jit(lambda *qkv: blocks.forward(*qkv, bounds, False))(q, k, v)
    blind = np.asarray(lse) <= -1e30
    assert blind.any() and not np.asarray(jnp.swapaxes(out, 1, 2))[blind].any()


@pytest.mark.gpu
@pytest.mark.validates("attention triton")
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize(("causal", "packed"), [(True, False), (False, False), (False, True)])
def test_blocks_on_gpu(H, causal, packed):
    check("triton", Target.here(), 2, 1500, 8, 2, H, "bfloat16", causal, packed)
