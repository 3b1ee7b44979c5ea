"""What attention is given, the same for every implementation."""


def check(q, k, v, segment_ids=None) -> None:
    """q [B, T, N, H], k and v [B, T, K, H] of one dtype, no side 0, K a divisor of N; segment_ids
    [B, T] or None. Raises ValueError else, with the shapes or dtypes."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: want [B, T, N, H] and twice [B, T, K, H]"
        )
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q {q.shape} and k {k.shape}: no side may be 0")
    (B, T, N, H), K = q.shape, k.shape[2]
    if k.shape != (B, T, K, H) or N % K:
        raise ValueError(f"q {q.shape} and k {k.shape}: B, T and H must agree, and K divide N")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: want one dtype for all")
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids {segment_ids.shape}: want {(B, T)}")
