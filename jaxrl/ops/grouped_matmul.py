"""Grouped matmul, the product of mixture-of-experts layers: which implementation runs, by name."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxrl_kernels.grouped_matmul import arguments, reference, triton
from jaxrl_kernels.launch import why_not_triton
from jaxtyping import Array, Float, Int

from jaxrl.ops import experts_xla, grouped_matmul_xla, tokamax_kernels
from jaxrl.ops.registry import Implementation, Op, Target


@dataclasses.dataclass(frozen=True)
class GroupedOps:
    """The products of an expert layer, from one implementation; rows sorted by expert, as in
    `grouped_matmul`.

    matmul(x, w, group_sizes) = x w[e]; lora_matmul(x, w, a, b, group_sizes) = x w[e] + x a[e] b[e];
    swiglu(x, w_gate, w_up, group_sizes) = silu(x w_gate[e]) * (x w_up[e]). `name`: of the
    implementation. `experts`: the whole layer on tokens (`experts_xla.experts`), if it has that.
    """

    name: str
    matmul: Callable
    lora_matmul: Callable
    swiglu: Callable
    experts: Callable | None = None


def resolve_grouped_matmul(
    name: str, *, target: Target, dtype, features: tuple[int, int]
) -> GroupedOps:
    """The expert layers' products for weights of `features` (D, F); ValueError as `Op.resolve`."""
    name, matmul = GROUPED_MATMUL.resolve(name, target, dtype=dtype, features=features)
    if name == "triton":
        compiled_for = {"gpu": target.gpu, "capability": target.capability}
        fused = (triton.grouped_lora_matmul, triton.grouped_swiglu)
        return GroupedOps(name, matmul, *(functools.partial(f, **compiled_for) for f in fused))
    if name == "xla":
        fused = {"swiglu": grouped_matmul_xla.grouped_swiglu, "experts": experts_xla.experts}
        return dataclasses.replace(composed(name, matmul), **fused)
    return composed(name, matmul)


def composed(name: str, matmul: Callable) -> GroupedOps:
    """The same products from the plain one, where an implementation has not fused them."""

    def lora_matmul(x, w, a, b, group_sizes):
        low_rank = matmul(matmul(x, a, group_sizes), b, group_sizes)
        return matmul(x, w, group_sizes) + low_rank

    def swiglu(x, w_gate, w_up, group_sizes):
        return jax.nn.silu(matmul(x, w_gate, group_sizes)) * matmul(x, w_up, group_sizes)

    return GroupedOps(name, matmul, lora_matmul, swiglu)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str = "auto",
    target: Target | None = None,
) -> Float[Array, "M N"]:
    """Rows times their expert's weights, in the dtype of x; sums in fp32; differentiable.

    x holds group_sizes[0] rows of expert 0, then those of expert 1, ...; group_sizes sums to at
    most M, and rows beyond all groups yield zeros. w is multiplied in the dtype of x, and its
    gradient has its own dtype. target: what the program is for, default the default device. Raises
    ValueError for shapes or dtypes that do not fit, and where `implementation` cannot do this
    there, naming those that can.

    Kernels are opaque to the SPMD partitioner: over several devices, call it in a `shard_map`,
    whose gradients need check_vma=False. jax-triton has no `vmap`.
    """
    arguments.check(x, group_sizes, w=w)
    target = target or Target.here()
    case = {"dtype": x.dtype, "features": (w.shape[1], w.shape[2])}
    _, fn = GROUPED_MATMUL.resolve(implementation, target, **case)
    return fn(x, w, group_sizes)


def _anywhere(target: Target, **_) -> None:
    return None


def _why_not_triton(target: Target, *, dtype, features: tuple[int, int]) -> str | None:
    del features
    if target.backend != "gpu":
        return f"needs an NVIDIA GPU, and this program is for {target.backend}"
    if jnp.dtype(dtype).name not in triton.DTYPES:
        return f"takes {', '.join(triton.DTYPES)}, not {jnp.dtype(dtype).name}"
    return why_not_triton(target.capability)


def _why_not_tokamax(target: Target, *, dtype, features: tuple[int, int]) -> str | None:
    if target.backend != "gpu":
        return f"needs an NVIDIA GPU, and this program is for {target.backend}"
    return tokamax_kernels.why_not_ragged_dot(target.capability, dtype, features)


def _make_triton(target: Target):
    return lambda x, w, group_sizes: triton.grouped_matmul(
        x, w, group_sizes, gpu=target.gpu, capability=target.capability
    )


def _make_tokamax(target: Target):
    def tokamax(x, w, group_sizes):
        # An adapter's rank is too narrow for Mosaic's tiles.
        mosaic = tokamax_kernels.why_not_ragged_dot(target.capability, x.dtype, w.shape[1:]) is None
        return tokamax_kernels.ragged_dot(
            x,
            w.astype(x.dtype),  # its gradient of w comes rounded to the dtype of x
            group_sizes,
            implementation=None if mosaic else "triton",
        )

    return tokamax


# In the order in which "auto" looks for one that can run.
GROUPED_MATMUL = Op(
    "grouped_matmul",
    (
        Implementation("triton", _make_triton, _why_not_triton, ours=True),
        Implementation("tokamax", _make_tokamax, _why_not_tokamax),
        Implementation("xla", lambda _: grouped_matmul_xla.grouped_matmul, _anywhere, plain=True),
        Implementation("reference", lambda _: reference.grouped_matmul, _anywhere),
    ),
    never_auto=frozenset({"reference"}),
)
