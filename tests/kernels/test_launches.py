"""What each kernel is launched with: its FLOPs and bytes, which a profile shows and a plan adds up,
and the precision of its products."""

import jax
import jax.numpy as jnp
import pytest
from jaxrl_kernels.flash_attention import triton as attention
from jaxrl_kernels.grouped_matmul import cost
from jaxrl_kernels.grouped_matmul import triton as grouped

DTYPES = [("bfloat16", 2, "tf32"), ("float32", 4, "ieee")]


def launches(monkeypatch, module, function, *operands):
    """{kernel: [(FLOPs, bytes, precision), ...]} of value and gradients; results are zeros."""
    seen = {}

    def launch(kernel, *inputs, out, name, flops, bytes_accessed, PRECISION, **_):
        seen.setdefault(name.removeprefix("jaxrl_"), []).append((flops, bytes_accessed, PRECISION))
        return [jnp.zeros(s.shape, s.dtype) for s in out]

    monkeypatch.setattr(module, "launch", launch)
    out, vjp = jax.vjp(function, *operands)
    vjp(out)
    return seen


@pytest.mark.parametrize(("dtype", "size", "precision"), DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_attention(monkeypatch, dtype, size, precision, causal):
    B, T, N, K, H = 2, 10, 4, 2, 16
    q, k = jnp.zeros((B, T, N, H), dtype), jnp.zeros((B, T, K, H), dtype)
    seen = launches(
        monkeypatch, attention, lambda *a: attention.flash_attention(*a, causal=causal), q, k, k
    )
    one = 2 * B * N * H * (T * (T + 1) // 2 if causal else T * T)  # of one product
    queries, keys, rows = size * B * T * N * H, size * B * T * K * H, 4 * B * T * N
    assert seen == {
        "flash_attention_forward": [(2 * one, 2 * queries + 2 * keys + rows, precision)],
        "flash_attention_dq": [(3 * one, 3 * queries + 2 * keys + 2 * rows, precision)],
        "flash_attention_dkv": [(4 * one, 2 * queries + 4 * keys + 2 * rows, precision)],
    }


@pytest.mark.parametrize(("dtype", "size", "precision"), DTYPES)
def test_grouped_products(monkeypatch, dtype, size, precision):
    M, E, K, N, R = 10, 3, 16, 24, 4
    x, w, a, b = (jnp.zeros(s, dtype) for s in ((M, K), (E, K, N), (E, K, R), (E, R, N)))
    sizes = jnp.array([4, 0, 6])

    def rows(depths, width):
        flops = cost.flops(M, [(depth, width) for depth in depths])
        return flops, cost.rows_bytes(M, E, depths, width, size), precision

    def weights(i, j):
        return cost.flops(M, [(i, j)]), cost.weights_bytes(M, E, i, j, size, size), precision

    seen = launches(
        monkeypatch, grouped, lambda *a: grouped.grouped_lora_matmul(*a, sizes), x, w, a, b
    )
    assert seen == {
        "grouped_matmul_forward": [rows([K], R), rows([K, R], N)],
        "grouped_matmul_dx": [rows([N], R), rows([N, R], K)],
        "grouped_matmul_dw": [weights(K, N), weights(K, R), weights(R, N)],
    }
    seen = launches(monkeypatch, grouped, lambda *a: grouped.grouped_swiglu(*a, sizes), x, w, w)
    fused = cost.flops(M, [(K, N)] * 2), cost.swiglu_bytes(M, E, K, N, size, residuals=True)
    assert seen == {
        "grouped_swiglu": [(*fused, precision)],
        "grouped_matmul_dx": [rows([N, N], K)],
        "grouped_matmul_dw": [weights(K, N)] * 2,
    }
