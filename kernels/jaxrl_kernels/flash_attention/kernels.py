"""Flash attention in Triton: forward, and a backward of two kernels without atomics.

FlashAttention-2 (arXiv:2307.08691): scores are made block by block and never stored; backward makes
them again from the log-sum-exp. One program owns one block of queries (forward, dq) or of keys
(dk and dv, over all query heads that share them), so every sum has a fixed order.

Every key a query may see lies in one range of positions: [its document's start, itself] with a
causal mask, its whole document without. So a block of queries walks the blocks of keys from the
first query's first key to the last query's last key and visits no other; those in the middle, which
all its queries see whole, need no mask. The same holds for keys and the queries that see them.

q, out, dout, dq are [B, T, N, H]; k, v, dk, dv [B, T, K, H]; lse and delta [B, N, T] fp32; starts
and ends [B, T]. Heads are padded to BLOCK_H, a power of two. Imported only where Triton is there.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1e30)  # finite: a row that sees nothing of a block must not turn into NaN


@triton.jit
def _tile(ptr, row, heads, head, H: tl.constexpr, rows: tl.constexpr, BLOCK_H: tl.constexpr):
    """Pointers to [rows, BLOCK_H] of one head of a [*, heads, H] array, from `row` on."""
    base = ptr + (row.to(tl.int64) * heads + head) * H
    return base + (tl.arange(0, rows) * (heads * H))[:, None] + tl.arange(0, BLOCK_H)[None, :]


@triton.jit
def _load(ptrs, inside, H: tl.constexpr, BLOCK_H: tl.constexpr, TAIL: tl.constexpr):
    """Load a tile; rows that are not `inside`, and the padding of heads, are 0."""
    if TAIL and H < BLOCK_H:
        return tl.load(ptrs, inside[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :], other=0.0)
    elif TAIL:
        return tl.load(ptrs, inside[:, None], other=0.0)
    elif H < BLOCK_H:
        return tl.load(ptrs, (tl.arange(0, BLOCK_H) < H)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store(ptrs, value, inside, H: tl.constexpr, BLOCK_H: tl.constexpr):
    mask = inside[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :]
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask)


@triton.jit
def _keys_of(
    first,
    starts,
    ends,
    T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Blocks of keys that queries from `first` on visit, and those that all see whole.

    Returns (begin, whole_begin, whole_end, end), in blocks. starts, ends: of this row of the batch.
    """
    last = tl.minimum(first + BLOCK_Q, T) - 1
    begin = 0
    whole_begin = 0
    if PACKED:
        begin = tl.load(starts + first) // BLOCK_K
        whole_begin = tl.cdiv(tl.load(starts + last), BLOCK_K)
    if CAUSAL:
        end_token = last + 1
        whole_token = first + 1
    elif PACKED:
        end_token = tl.load(ends + last)
        whole_token = tl.load(ends + first)
    else:
        end_token = T
        whole_token = T
    end = tl.cdiv(end_token, BLOCK_K)
    whole_begin = tl.minimum(whole_begin, end)
    whole_end = tl.maximum(whole_begin, whole_token // BLOCK_K)
    return begin, whole_begin, whole_end, end


@triton.jit
def _queries_of(
    first,
    starts,
    ends,
    T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Blocks of queries that see keys from `first` on, as `_keys_of`."""
    last = tl.minimum(first + BLOCK_K, T) - 1
    begin_token = 0
    whole_begin_token = 0
    end_token = T
    whole_token = T
    if PACKED:
        begin_token = tl.load(starts + first)
        whole_begin_token = tl.load(starts + last)
        end_token = tl.load(ends + last)
        whole_token = tl.load(ends + first)
    if CAUSAL:
        begin_token = first
        whole_begin_token = last
    begin = begin_token // BLOCK_Q
    end = tl.cdiv(end_token, BLOCK_Q)
    whole_begin = tl.minimum(tl.cdiv(whole_begin_token, BLOCK_Q), end)
    whole_end = tl.maximum(whole_begin, whole_token // BLOCK_Q)
    return begin, whole_begin, whole_end, end


@triton.jit
def _visible(
    queries, keys, start, end, T: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr
):
    """Which keys [1, keys] queries [queries, 1] see; `start`, `end` of the queries' documents.

    Queries behind the row's end see something too: nothing divides by zero, nothing is stored.
    """
    seen = keys < T
    if CAUSAL:
        seen = seen & (keys <= queries)
    if PACKED:
        seen = seen & (keys >= start)
        if not CAUSAL:
            seen = seen & (keys < end)
    return seen


@triton.jit
def _forward_blocks(
    out, top, total, q, k_ptr, v_ptr, begin, end, b, k_head, queries, start, stop, scale,
    T: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry (out, top, total) of one block of queries over blocks of keys begin..end."""
    for j in range(begin, end):
        first = j * BLOCK_K
        keys = first + tl.arange(0, BLOCK_K)
        TAIL: tl.constexpr = MASKED and T % BLOCK_K != 0
        k = _load(_tile(k_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), keys < T,
                  H, BLOCK_H, TAIL)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = _visible(queries[:, None], keys[None, :], start[:, None], stop[:, None],
                            T, CAUSAL, PACKED)  # fmt: skip
            s = tl.where(seen, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None]
        v = _load(_tile(v_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), keys < T,
                  H, BLOCK_H, TAIL)  # fmt: skip
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top
    return out, top, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, out_ptr, lse_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries of one head. Grid: (blocks of queries, N, B)."""
    # With a causal mask the last block is the longest: it goes first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head, b = tl.program_id(1), tl.program_id(2)
    k_head = head // (N // K)
    queries = first + tl.arange(0, BLOCK_Q)
    inside = queries < T
    starts, ends = starts_ptr + b * T, ends_ptr + b * T
    start, stop = queries, queries
    if PACKED:
        start = tl.load(starts + queries, inside, other=0)
        if not CAUSAL:
            stop = tl.load(ends + queries, inside, other=T)
    q = _load(_tile(q_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), inside, H, BLOCK_H,
              T % BLOCK_Q != 0)  # fmt: skip
    scale = SCALE * LOG2E
    out = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    top = tl.full([BLOCK_Q], NEVER, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    begin, whole_begin, whole_end, end = _keys_of(
        first, starts, ends, T, BLOCK_Q, BLOCK_K, CAUSAL, PACKED
    )
    if PACKED:
        out, top, total = _forward_blocks(
            out, top, total, q, k_ptr, v_ptr, begin, whole_begin, b, k_head, queries, start, stop,
            scale, T, K, H, BLOCK_K, BLOCK_H, CAUSAL, PACKED, True, PRECISION,
        )  # fmt: skip
    out, top, total = _forward_blocks(
        out, top, total, q, k_ptr, v_ptr, whole_begin, whole_end, b, k_head, queries, start, stop,
        scale, T, K, H, BLOCK_K, BLOCK_H, CAUSAL, PACKED, False, PRECISION,
    )  # fmt: skip
    out, top, total = _forward_blocks(
        out, top, total, q, k_ptr, v_ptr, whole_end, end, b, k_head, queries, start, stop,
        scale, T, K, H, BLOCK_K, BLOCK_H, CAUSAL, PACKED, True, PRECISION,
    )  # fmt: skip
    out = out / total[:, None]
    _store(_tile(out_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), out, inside, H, BLOCK_H)
    lse = (top + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (b.to(tl.int64) * N + head) * T + queries, lse, inside)


@triton.jit
def _dq_blocks(
    dq, q, do, lse, delta, k_ptr, v_ptr, begin, end, b, k_head, queries, start, stop, scale,
    T: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries plus what blocks of keys begin..end add. lse is in base 2."""
    for j in range(begin, end):
        first = j * BLOCK_K
        keys = first + tl.arange(0, BLOCK_K)
        TAIL: tl.constexpr = MASKED and T % BLOCK_K != 0
        k = _load(_tile(k_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), keys < T,
                  H, BLOCK_H, TAIL)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            seen = _visible(queries[:, None], keys[None, :], start[:, None], stop[:, None],
                            T, CAUSAL, PACKED)  # fmt: skip
            p = tl.where(seen, p, 0.0)
        v = _load(_tile(v_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), keys < T,
                  H, BLOCK_H, TAIL)  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, ends_ptr, dq_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head. Grid: (blocks of queries, N, B)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head, b = tl.program_id(1), tl.program_id(2)
    k_head = head // (N // K)
    queries = first + tl.arange(0, BLOCK_Q)
    inside = queries < T
    starts, ends = starts_ptr + b * T, ends_ptr + b * T
    start, stop = queries, queries
    if PACKED:
        start = tl.load(starts + queries, inside, other=0)
        if not CAUSAL:
            stop = tl.load(ends + queries, inside, other=T)
    TAIL: tl.constexpr = T % BLOCK_Q != 0
    q = _load(_tile(q_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), inside, H, BLOCK_H, TAIL)
    do = _load(
        _tile(dout_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), inside, H, BLOCK_H, TAIL
    )
    row = (b.to(tl.int64) * N + head) * T + queries
    lse = tl.load(lse_ptr + row, inside, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + row, inside, other=0.0)
    scale = SCALE * LOG2E
    dq = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    begin, whole_begin, whole_end, end = _keys_of(
        first, starts, ends, T, BLOCK_Q, BLOCK_K, CAUSAL, PACKED
    )
    if PACKED:
        dq = _dq_blocks(
            dq, q, do, lse, delta, k_ptr, v_ptr, begin, whole_begin, b, k_head, queries, start,
            stop, scale, T, K, H, BLOCK_K, BLOCK_H, CAUSAL, PACKED, True, PRECISION,
        )  # fmt: skip
    dq = _dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, whole_begin, whole_end, b, k_head, queries, start,
        stop, scale, T, K, H, BLOCK_K, BLOCK_H, CAUSAL, PACKED, False, PRECISION,
    )  # fmt: skip
    dq = _dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, whole_end, end, b, k_head, queries, start,
        stop, scale, T, K, H, BLOCK_K, BLOCK_H, CAUSAL, PACKED, True, PRECISION,
    )  # fmt: skip
    _store(
        _tile(dq_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), dq * SCALE, inside, H, BLOCK_H
    )


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, begin, end, b, head, keys, start, stop,
    scale, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of one block of keys plus what one head's blocks of queries begin..end add.

    Scores are keys by queries. `start`, `stop`: of the keys' documents.
    """
    for i in range(begin, end):
        first = i * BLOCK_Q
        queries = first + tl.arange(0, BLOCK_Q)
        TAIL: tl.constexpr = MASKED and T % BLOCK_Q != 0
        inside = queries < T
        q = _load(_tile(q_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), inside,
                  H, BLOCK_H, TAIL)  # fmt: skip
        row = (b.to(tl.int64) * N + head) * T + queries
        if TAIL:
            lse = tl.load(lse_ptr + row, inside, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + row, inside, other=0.0)
        else:
            lse = tl.load(lse_ptr + row) * LOG2E
            delta = tl.load(delta_ptr + row)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale - lse[None, :])
        if MASKED:
            seen = (keys < T)[:, None] & inside[None, :]
            if CAUSAL:
                seen = seen & (keys[:, None] <= queries[None, :])
            if PACKED:
                seen = seen & (queries[None, :] < stop[:, None])
                if not CAUSAL:
                    seen = seen & (queries[None, :] >= start[:, None])
            p = tl.where(seen, p, 0.0)
        do = _load(_tile(dout_ptr, b * T + first, N, head, H, BLOCK_Q, BLOCK_H), inside,
                   H, BLOCK_H, TAIL)  # fmt: skip
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, ends_ptr, dk_ptr, dv_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of one block of keys, summed over the query heads. Grid: (blocks of keys, K, B)."""
    first = tl.program_id(0) * BLOCK_K
    k_head, b = tl.program_id(1), tl.program_id(2)
    keys = first + tl.arange(0, BLOCK_K)
    inside = keys < T
    starts, ends = starts_ptr + b * T, ends_ptr + b * T
    start, stop = keys, keys
    if PACKED:
        stop = tl.load(ends + keys, inside, other=0)
        if not CAUSAL:
            start = tl.load(starts + keys, inside, other=T)
    TAIL: tl.constexpr = T % BLOCK_K != 0
    k = _load(_tile(k_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), inside, H, BLOCK_H, TAIL)
    v = _load(_tile(v_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), inside, H, BLOCK_H, TAIL)
    scale = SCALE * LOG2E
    dk = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    begin, whole_begin, whole_end, end = _queries_of(
        first, starts, ends, T, BLOCK_Q, BLOCK_K, CAUSAL, PACKED
    )
    G: tl.constexpr = N // K
    for g in range(G):
        head = k_head * G + g
        if CAUSAL or PACKED:
            dk, dv = _dkv_blocks(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, begin, whole_begin, b, head,
                keys, start, stop, scale, T, N, H, BLOCK_Q, BLOCK_H, CAUSAL, PACKED, True,
                PRECISION,
            )  # fmt: skip
        dk, dv = _dkv_blocks(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, whole_begin, whole_end, b, head,
            keys, start, stop, scale, T, N, H, BLOCK_Q, BLOCK_H, CAUSAL, PACKED, False, PRECISION,
        )  # fmt: skip
        if PACKED or T % BLOCK_Q != 0:
            dk, dv = _dkv_blocks(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, whole_end, end, b, head,
                keys, start, stop, scale, T, N, H, BLOCK_Q, BLOCK_H, CAUSAL, PACKED, True,
                PRECISION,
            )  # fmt: skip
    _store(
        _tile(dk_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), dk * SCALE, inside, H, BLOCK_H
    )
    _store(_tile(dv_ptr, b * T + first, K, k_head, H, BLOCK_K, BLOCK_H), dv, inside, H, BLOCK_H)
