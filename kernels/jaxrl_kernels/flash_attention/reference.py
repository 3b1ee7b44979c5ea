"""Plain attention with all T x T scores: what the kernels are tested against."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_kernels.documents import document_bounds
from jaxrl_kernels.flash_attention import arguments


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_ids: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """As the Triton `flash_attention`, in fp32 and with [B, N, T, T] memory; takes any floating
    dtype, head_dim and scale."""
    arguments.check(q, k, v, segment_ids)
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k.astype(jnp.float32), precision=exact)
    scores = scores * (H**-0.5 if scale is None else scale)
    mask = jnp.ones((1, T, T), bool)
    if causal:
        mask = jnp.tril(mask)
    if segment_ids is not None:
        starts, _ = document_bounds(segment_ids)  # tell documents apart, also if an id comes back
        mask = mask & (starts[:, :, None] == starts[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v.astype(jnp.float32), precision=exact)
    out = out.reshape(q.shape).astype(q.dtype)
    if not return_lse:
        return out
    return out, jax.nn.logsumexp(scores, axis=-1).reshape(B, N, T)
