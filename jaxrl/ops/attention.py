"""Causal attention: which implementation runs, decided once, by name."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl.ops.attention_xla import blocked_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "reference")


@dataclasses.dataclass(frozen=True)
class Attend:
    """A resolved implementation: its name, and `fn(q, k, v, segment_ids) -> out`."""

    name: str
    fn: Callable


def resolve_attention(name: str, *, backend: str, dtype, head_dim: int, packed: bool) -> Attend:
    """The implementation for `name` on `backend` ("cpu" or "gpu").

    "auto": cudnn on GPUs where it can run, else xla. An explicit request that cannot be met is a
    `ValueError` that says why and what could run.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {name!r}; one of {', '.join(IMPLEMENTATIONS)}")
    why_not = _why_not_cudnn(backend, dtype, head_dim, packed)
    if name == "auto":
        name = "xla" if why_not else "cudnn"
    if name == "cudnn" and why_not:
        raise ValueError(f"attention 'cudnn' {why_not}; use 'xla'")
    functions = {"xla": keepable(blocked_attention), "cudnn": keepable(_cudnn)}
    return Attend(name, functions.get(name, reference))


def keepable(attend: Callable) -> Callable:
    """`attend`, with what its backward needs named for `jax.checkpoint` policies.

    Its output is "attention_out", the rest (the log-sum-exp) "attention_residual"; q, k and v are
    recomputed. A name put on the output outside would not keep attention from running again.
    """

    @jax.custom_vjp
    def named(q, k, v, segment_ids):
        return attend(q, k, v, segment_ids)

    def forward(q, k, v, segment_ids):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
        kept = checkpoint_name(out, "attention_out")

        def name(residual):
            if residual is out:
                return kept
            if not jnp.issubdtype(residual.dtype, jnp.inexact):
                return residual
            return checkpoint_name(residual, "attention_residual")

        return kept, vjp.replace(opaque_residuals=[name(r) for r in vjp.opaque_residuals])

    named.defvjp(forward, lambda vjp, dout: (*vjp(dout), None))
    return named


def _why_not_cudnn(backend: str, dtype, head_dim: int, packed: bool) -> str | None:
    if backend not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, and this program is for {backend}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim > 128 or head_dim % 8:
        return f"takes head_dim up to 128 in steps of 8, not {head_dim}"
    if packed:
        return "has no packed documents (segment_ids)"
    return None


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Plain causal attention in fp32 with all T x S scores: the tests' oracle."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k.astype(jnp.float32)) / H**0.5
    mask = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores), v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)


def _cudnn(q, k, v, segment_ids):
    del segment_ids  # `resolve_attention` refused packed batches
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
