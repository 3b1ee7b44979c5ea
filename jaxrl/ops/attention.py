"""Attention: one function, several implementations, of which one is chosen once, by name."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxrl_kernels.documents import document_bounds
from jaxrl_kernels.flash_attention import arguments, reference, triton
from jaxrl_kernels.launch import why_not_triton
from jaxtyping import Array, Float, Int

from jaxrl.ops import tokamax_kernels
from jaxrl.ops.attention_xla import blocked_attention
from jaxrl.ops.registry import Implementation, Op, Target


@dataclasses.dataclass(frozen=True)
class Attend:
    """A resolved implementation: its name, and `fn(q, k, v, documents) -> out`; documents are
    segment ids, None, or, where it is one for them, `shared_prefix.Families`."""

    name: str
    fn: Callable


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    implementation: str = "auto",
    target: Target | None = None,
) -> Array | tuple[Array, Array]:
    """softmax(scale q k^T) v within documents [B, T, N, H], sums in fp32; arXiv:2205.14135.

    N is a multiple of K (grouped queries; keys are not repeated). segment_ids: runs of equal ids
    are documents. scale: default 1 / sqrt(H). return_lse: also the log-sum-exp of each query's
    scores, fp32 [B, N, T], differentiable. target: what the program is for, default the default
    device. Raises ValueError for shapes or dtypes that do not fit, and where `implementation`
    cannot do this there, naming those that can.

    Not-a-number in a key or value that a query does not see can still reach it, as 0 times that,
    where both are in one block. Kernels are opaque to the SPMD partitioner: over several devices,
    call it in a `shard_map`, whose gradients need check_vma=False. jax-triton has no `vmap`.
    """
    arguments.check(q, k, v, segment_ids)
    _, fn = ATTENTION.resolve(
        implementation,
        target or Target.here(),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        packed=segment_ids is not None,
        seq_len=q.shape[1],
        causal=causal,
        lse=return_lse,
    )
    return fn(q, k, v, segment_ids, scale=scale, causal=causal, return_lse=return_lse)


def resolve_attention(
    name: str, *, target: Target, dtype, head_dim: int, packed: bool, seq_len: int
) -> Attend:
    """The causal attention of a model, for `checkpoint` policies named as `keepable` says.

    Raises ValueError as `Op.resolve` does.
    """
    case = {"dtype": dtype, "head_dim": head_dim, "packed": packed, "seq_len": seq_len}
    name, fn = ATTENTION.resolve(name, target, **case)
    return Attend(name, keepable(fn))


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


def _anywhere(target: Target, **_) -> None:
    return None


# Blocks of queries and keys whose results are merged, see `attention_blocks`.
_NO_BLOCKS = (
    "gives no log-sum-exp of a block and takes none in backward, which a ring over devices and "
    "shared prompts need (the context method 'ulysses' and prompts that are not shared do not)"
)


def _why_not_cudnn(
    target: Target,
    *,
    dtype,
    head_dim: int,
    packed: bool,
    seq_len: int,
    lse: bool = False,
    blocks: bool = False,
    **_,
) -> str | None:
    if blocks:
        return _NO_BLOCKS
    if target.backend != "gpu":
        return f"needs an NVIDIA GPU, and this program is for {target.backend}"
    if target.capability < 80:
        return f"needs sm_80 or newer, and this is sm_{target.capability}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim > 128 or head_dim % 8:
        return f"takes head_dim up to 128 in steps of 8, not {head_dim}"
    if seq_len % 2:
        return f"takes an even number of tokens, not {seq_len}"
    if packed:
        return "has no packed documents (segment_ids)"
    if lse:
        return "gives no log-sum-exp that can be differentiated"
    return None


def _why_not_triton(target: Target, *, dtype, head_dim: int, **_) -> str | None:
    if target.backend != "gpu":
        return f"needs an NVIDIA GPU, and this program is for {target.backend}"
    if jnp.dtype(dtype).name not in triton.DTYPES:
        return f"takes {', '.join(triton.DTYPES)}, not {jnp.dtype(dtype).name}"
    if head_dim > triton.MAX_HEAD_DIM:
        return f"takes head_dim up to {triton.MAX_HEAD_DIM}, not {head_dim}"
    return why_not_triton(target.capability)


def _why_not_tokamax(
    target: Target,
    *,
    dtype,
    head_dim: int,
    packed: bool,
    lse: bool = False,
    blocks: bool = False,
    **_,
) -> str | None:
    if blocks:
        return _NO_BLOCKS
    if target.backend != "gpu":
        return f"needs an NVIDIA GPU, and this program is for {target.backend}"
    if lse:
        return "gives no log-sum-exp that can be differentiated"
    return tokamax_kernels.why_not_attention(target.capability, dtype, head_dim, packed)


def cudnn_workspace_bytes(B: int, T: int, N: int, H: int) -> int:
    """Bytes that cuDNN's backward takes beside its arrays, in bf16 or fp16.

    XLA asks cuDNN for it on a GPU only, so no plan shows it. dq in fp32, dk and dv of every query
    head, and a number per query: as measured on an H200 (cuDNN 9.19, bench/KERNELS.md).
    """
    return B * T * N * (4 * H + 2 * 2 * H + 4)


def _make_cudnn(target: Target):
    del target

    def cudnn(q, k, v, segment_ids=None, *, scale=None, causal=True, return_lse=False):
        del segment_ids, return_lse  # refused
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
        )

    return cudnn


def _make_triton(target: Target):
    def ours(q, k, v, segment_ids=None, **options):
        return triton.flash_attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            gpu=target.gpu,
            capability=target.capability,
            **options,
        )

    return ours


def _make_tokamax(target: Target):
    del target

    def tokamax(q, k, v, segment_ids=None, **options):
        starts = ends = None
        if segment_ids is not None:
            starts, ends = document_bounds(segment_ids)
        return tokamax_kernels.attention(q, k, v, starts=starts, ends=ends, **options)

    return tokamax


def _make_reference(target: Target):
    del target
    return lambda q, k, v, segment_ids=None, **options: reference.flash_attention(
        q, k, v, segment_ids=segment_ids, **options
    )


# In the order in which "auto" looks for one that can run.
ATTENTION = Op(
    "attention",
    (
        Implementation("cudnn", _make_cudnn, _why_not_cudnn),
        Implementation("triton", _make_triton, _why_not_triton, ours=True),
        Implementation("tokamax", _make_tokamax, _why_not_tokamax),
        Implementation("xla", lambda _: blocked_attention, _anywhere, plain=True),
        Implementation("reference", _make_reference, _anywhere),
    ),
    never_auto=frozenset({"reference"}),
)
