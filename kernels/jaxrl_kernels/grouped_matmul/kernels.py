"""Grouped products in Triton: rows times their expert's weights, and the weights' gradient.

x [M, K] holds the rows of expert 0, then those of expert 1, ...; w is [E, K, N]. A program owns
one tile of the output and every sum has a fixed order: no atomics.

`rows_kernel` and `swiglu_kernel` walk a schedule of tiles of rows (schedule.py), each of one
expert. A tile's rows are clamped to its last one rather than masked: what a row too many yields is
not stored. `weights_kernel` sums over the rows of its expert, and masks them: they are added up.

Offsets within a tile are 32-bit, those of a tile are 64-bit: M K and E K N may pass 2^31.
Imported only where Triton is there.
"""

import triton
import triton.language as tl


@triton.jit
def _my_tile(TILES: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """(tile of rows, column of tiles) of this program.

    Programs that run at the same time share rows and weights in L2: they cover bands, BAND tiles of
    rows high and all columns wide, going down before they go right.
    """
    program = tl.program_id(0)
    first = (program // (BAND * COLUMNS)) * BAND
    height = tl.minimum(TILES - first, BAND)
    inside = program % (BAND * COLUMNS)
    return first + inside % height, inside // height


@triton.jit
def _rows(x_ptr, first, end, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers to [BLOCK_M, BLOCK_K] of an [M, K] array, rows first..end, the last one repeated."""
    row = tl.minimum(tl.arange(0, BLOCK_M), end - first - 1)
    return x_ptr + first.to(tl.int64) * K + (row * K)[:, None] + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _weights(
    w_ptr, group, column,
    K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pointers to the first [BLOCK_K, BLOCK_N] of a column of tiles of w[group].

    w is [E, K, N]; or [E, N, K] if TRANSPOSED, as the gradient of the rows wants it.
    """
    k = tl.arange(0, BLOCK_K)[:, None]
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    base = w_ptr + group.to(tl.int64) * (K * N)
    if TRANSPOSED:
        return base + n * K + k
    else:
        return base + k * N + n


@triton.jit
def _load_rows(ptrs, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    if K % BLOCK_K == 0:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, (k < K)[None, :], other=0.0)


@triton.jit
def _load_weights(
    ptrs, k, n, K: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    if K % BLOCK_K == 0 and N % BLOCK_N == 0:
        return tl.load(ptrs)
    elif N % BLOCK_N == 0:
        return tl.load(ptrs, (k < K)[:, None], other=0.0)
    elif K % BLOCK_K == 0:
        return tl.load(ptrs, (n < N)[None, :], other=0.0)
    else:
        return tl.load(ptrs, (k < K)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def _accumulate(
    acc, x_ptr, w_ptr, group, first, end, column, live,
    K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus rows first..end times a column of tiles of w[group]; just acc if not `live`."""
    x = _rows(x_ptr, first, end, K, BLOCK_M, BLOCK_K)
    w = _weights(w_ptr, group, column, K, N, TRANSPOSED, BLOCK_N, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    for step in range(tl.where(live, tl.cdiv(K, BLOCK_K), 0)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = tl.dot(
            _load_rows(x, k, K, BLOCK_K),
            _load_weights(w, k, n, K, N, BLOCK_K, BLOCK_N),
            acc,
            input_precision=PRECISION,
        )
        x += BLOCK_K
        w += BLOCK_K if TRANSPOSED else BLOCK_K * N
    return acc


@triton.jit
def _store(
    out_ptr, value, first, end, column,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = out_ptr + first.to(tl.int64) * N + (row * N)[:, None] + n[None, :]
    inside = (row < end - first)[:, None]
    if N % BLOCK_N != 0:
        inside = inside & (n < N)[None, :]
    tl.store(ptrs, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def rows_kernel(
    x_ptr, w_ptr, x2_ptr, w2_ptr, schedule_ptr, out_ptr,
    TILES: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, K2: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_K2: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] w[e] + x2 [M, K2] w2[e], for each row its expert e; K2 may be 0.

    TRANSPOSED: w and w2 are [E, N, K] and [E, N, K2]. Grid: TILES * columns of tiles.
    """
    tile, column = _my_tile(TILES, tl.cdiv(N, BLOCK_N), BAND)
    group = tl.load(schedule_ptr + tile)
    first = tl.load(schedule_ptr + TILES + tile)
    end = tl.load(schedule_ptr + 2 * TILES + tile)
    if first >= end:
        return
    live = group < E  # the rows beyond all groups have no weights, and are zeros
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _accumulate(acc, x_ptr, w_ptr, group, first, end, column, live,
                      K, N, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)  # fmt: skip
    if K2 > 0:
        acc = _accumulate(acc, x2_ptr, w2_ptr, group, first, end, column, live,
                          K2, N, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K2, PRECISION)  # fmt: skip
    _store(out_ptr, acc, first, end, column, N, BLOCK_M, BLOCK_N)


@triton.jit
def swiglu_kernel(
    x_ptr, gate_ptr, up_ptr, schedule_ptr, h_ptr, gate_out_ptr, up_out_ptr,
    TILES: tl.constexpr, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = silu(x w_gate[e]) * (x w_up[e]), and with RESIDUALS both products.

    Without RESIDUALS the pointers behind h are None. Grid: as `rows_kernel`.
    """
    tile, column = _my_tile(TILES, tl.cdiv(N, BLOCK_N), BAND)
    group = tl.load(schedule_ptr + tile)
    first = tl.load(schedule_ptr + TILES + tile)
    end = tl.load(schedule_ptr + 2 * TILES + tile)
    if first >= end:
        return
    x = _rows(x_ptr, first, end, K, BLOCK_M, BLOCK_K)
    w_gate = _weights(gate_ptr, group, column, K, N, False, BLOCK_N, BLOCK_K)
    w_up = _weights(up_ptr, group, column, K, N, False, BLOCK_N, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.where(group < E, tl.cdiv(K, BLOCK_K), 0)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = _load_rows(x, k, K, BLOCK_K)
        gate = tl.dot(rows, _load_weights(w_gate, k, n, K, N, BLOCK_K, BLOCK_N), gate,
                      input_precision=PRECISION)  # fmt: skip
        up = tl.dot(rows, _load_weights(w_up, k, n, K, N, BLOCK_K, BLOCK_N), up,
                    input_precision=PRECISION)  # fmt: skip
        x += BLOCK_K
        w_gate += BLOCK_K * N
        w_up += BLOCK_K * N
    h = gate / (1.0 + tl.exp(-gate)) * up
    _store(h_ptr, h, first, end, column, N, BLOCK_M, BLOCK_N)
    if RESIDUALS:
        _store(gate_out_ptr, gate, first, end, column, N, BLOCK_M, BLOCK_N)
        _store(up_out_ptr, up, first, end, column, N, BLOCK_M, BLOCK_N)


@triton.jit
def weights_kernel(
    x_ptr, dy_ptr, offsets_ptr, dw_ptr,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw[e] [K, N] = x_e^T dy_e over the rows of e, BLOCK_M at a time; zeros if it has none.

    Grid: (tiles of [K, N], E).
    """
    e = tl.program_id(1)
    depth, column = _my_tile(tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N), BAND)
    start, stop = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    row = tl.arange(0, BLOCK_M)
    # x is loaded as its transpose: of a tile transposed later the loads are not asynchronous on
    # sm_80 and sm_86.
    k = depth * BLOCK_K + tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    x = x_ptr + start.to(tl.int64) * K + (row * K)[None, :] + k[:, None]
    dy = dy_ptr + start.to(tl.int64) * N + (row * N)[:, None] + n[None, :]
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for m in range(start, stop, BLOCK_M):
        x_inside, dy_inside = (m + row < stop)[None, :], (m + row < stop)[:, None]
        if K % BLOCK_K != 0:
            x_inside = x_inside & (k < K)[:, None]
        if N % BLOCK_N != 0:
            dy_inside = dy_inside & (n < N)[None, :]
        acc = tl.dot(
            tl.load(x, x_inside, other=0.0),
            tl.load(dy, dy_inside, other=0.0),
            acc,
            input_precision=PRECISION,
        )
        x += BLOCK_M * K
        dy += BLOCK_M * N
    ptrs = dw_ptr + e.to(tl.int64) * (K * N) + (k * N)[:, None] + n[None, :]
    tl.store(ptrs, acc.to(dw_ptr.dtype.element_ty), (k < K)[:, None] & (n < N)[None, :])
