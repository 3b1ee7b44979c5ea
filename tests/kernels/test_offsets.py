"""Offsets beyond 2^31: the kernels on arrays of which only what is touched takes memory."""

import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jaxrl_kernels.flash_attention import kernels as flash
from jaxrl_kernels.grouped_matmul import kernels as grouped
from jaxrl_kernels.interpreter import _Buffer, _interpreted, _interpreting


def run(kernel, *arrays, grid, **static):
    """In the interpreter, without the copies of the arrays that a launch makes."""
    with _interpreting():
        _interpreted(kernel.fn).run(*map(_Buffer, arrays), grid=grid, warmup=False, **static)


def lazily(*shape):
    return np.zeros(shape, np.uint16).view(jnp.bfloat16)


def test_rows_and_experts_of_grouped_products():
    M, K, N, E = 2**20 + 16, 4096, 16, 2**15 + 1  # M K and E K N are above 2^31
    x, w, out = lazily(M, K), lazily(E, K, N), lazily(M, N)
    x[-16:], w[-1] = 1, 0.5
    tile = np.array([[E - 1], [M - 16], [M]], np.int32)  # the last rows, of the last expert
    static = dict(K=K, N=N, BLOCK_M=16, BLOCK_N=16, BLOCK_K=128, BAND=1, PRECISION="tf32")
    rows = dict(TILES=1, E=E, K2=0, TRANSPOSED=False, BLOCK_K2=16)
    run(grouped.rows_kernel, x, w, x, w, tile, out, grid=(1,), **rows, **static)
    assert np.all(out[-16:] == K / 2)
    # Back: the gradient of x is as large.
    wide = static | dict(K=N, N=K, BLOCK_N=128, BLOCK_K=16)
    dx, rows["TRANSPOSED"] = lazily(M, K), True
    out[-16:] = 1
    run(grouped.rows_kernel, out, w, out, w, tile, dx, grid=(K // 128,), **rows, **wide)
    assert np.all(dx[-16:] == N / 2)
    dy, offsets, dw = lazily(M, N), np.array([M - 16, M], np.int32), np.zeros((1, K, N), np.float32)
    dy[-16:] = 0.5
    run(grouped.weights_kernel, x, dy, offsets, dw, grid=(K // 128, 1), **static)
    assert np.all(dw == 8)


@triton.jit
def _offset(row_ptr, out_ptr, heads: tl.constexpr, H: tl.constexpr):
    tile = flash._tile(out_ptr, tl.load(row_ptr), heads, heads - 1, H, 16, 16).to(tl.int64)
    tl.store(out_ptr, tl.min(tl.min(tile, 1), 0) - out_ptr.to(tl.int64))


def test_tiles_of_attention():
    T, N, H = 262144, 96, 128
    out = np.zeros(1, np.int64)
    run(_offset, np.array([T - 16], np.int32), out, grid=(1,), heads=N, H=H)
    assert out[0] == out.itemsize * ((T - 16) * N + N - 1) * H
