"""What `bench/kernels.py` runs: the models' shapes, and each op as a function to differentiate."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any


class Cannot(Exception):
    """An implementation says that it does not take a case."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """One row of attention; `docs`: lengths of packed documents, or one document."""

    model: str
    T: int
    N: int
    K: int
    H: int
    docs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        packed = f" {len(self.docs)} documents" if self.docs else ""
        return f"{self.model} B1 T{self.T} N{self.N} K{self.K} H{self.H}{packed}"


@dataclasses.dataclass(frozen=True)
class Grouped:
    """One product of a MoE layer: M rows over E experts of K x N, evenly."""

    model: str
    M: int
    E: int
    K: int
    N: int

    @property
    def name(self) -> str:
        return f"{self.model} M{self.M} E{self.E} K{self.K} N{self.N}"


# Documents as they come in chats: a few long ones, many short ones.
MIXED = (4096, 37, 512, 1900, 255, 3000, 1, 1100, 640, 2048, 75, 1024, 1696)
SHAPES: dict[str, list] = {
    "attention": [
        Attention("Qwen3-0.6B", 16384, 16, 8, 128),
        Attention("Qwen3-4B, Llama-3.1-8B", 16384, 32, 8, 128),
        Attention("Qwen3-4B, Llama-3.1-8B", 16384, 32, 8, 128, MIXED),
        Attention("Qwen3-4B, Llama-3.1-8B", 65536, 32, 8, 128),
        Attention("Qwen3-30B-A3B", 16384, 32, 4, 128),
        Attention("Qwen3-235B-A22B", 16384, 64, 4, 128),
        Attention("INTELLECT-3", 16384, 96, 8, 128),
        Attention("Llama-3.2-1B", 16384, 32, 8, 64),
        Attention("Llama-3.2-1B", 16384, 32, 8, 64, MIXED),
        Attention("Llama-3.2-3B", 16384, 24, 8, 128),
    ],
    "grouped_matmul": [
        Grouped("Qwen3-30B-A3B", 131072, 128, 2048, 768),
        Grouped("Qwen3-30B-A3B", 131072, 128, 768, 2048),
        Grouped("Qwen3-30B-A3B LoRA", 131072, 128, 2048, 16),
        Grouped("Qwen3-30B-A3B LoRA", 131072, 128, 16, 768),
        Grouped("Qwen3-235B-A22B", 131072, 128, 4096, 1536),
        Grouped("INTELLECT-3", 131072, 128, 4096, 1408),
    ],
}
assert sum(MIXED) == 16384


@dataclasses.dataclass(frozen=True)
class Problem:
    """fn(*inputs, *fixed) is differentiated in its inputs; `plain` is what it should equal.

    visited(direction): blocks that our kernels visit.
    """

    fn: Callable
    plain: Callable
    inputs: list[tuple]
    fixed: list[Any]
    flops: dict[str, int]
    hbm_bytes: dict[str, int]
    visited: Callable[[str], int]


def problem(op: str, shape, implementation: str, target) -> Problem:
    return {"attention": _attention, "grouped_matmul": _grouped}[op](shape, implementation, target)


def resolve(op, implementation: str, target, **case) -> Callable:
    """The implementation, or `Cannot` with what it says."""
    try:
        return op.resolve(implementation, target, **case)[1]
    except ValueError as error:
        raise Cannot(str(error)) from None


def _attention(shape: Attention, implementation: str, target) -> Problem:
    import jax.numpy as jnp
    import numpy as np
    from jaxrl_kernels import tiles
    from jaxrl_kernels.flash_attention import cost, reference

    from jaxrl.ops.attention import ATTENTION

    T, N, K, H = shape.T, shape.N, shape.K, shape.H
    docs = shape.docs or (T,)
    ids = np.repeat(np.arange(len(docs), dtype=np.int32), docs)[None] if shape.docs else None
    case = {"dtype": jnp.bfloat16, "head_dim": H, "packed": ids is not None, "seq_len": T}
    fn = resolve(ATTENTION, implementation, target, **case)
    parts = {"forward": ("forward",), "backward": ("dq", "dkv")}
    moved = lambda w: cost.bytes_accessed(w, 1, T, N, K, H, 2)  # noqa: E731
    # What the mathematics needs: backward's five products, however a kernel arranges them.
    pairs = 2 * N * H * cost.pairs(docs)

    def visited(direction):
        total = 0
        for which in parts[direction]:
            tile = tiles.attention(which, target.gpu, target.capability, "bfloat16", H, T, N)
            total += N * cost.visited_blocks(docs, tile.block_q, tile.block_k)
        return total

    return Problem(
        fn=lambda q, k, v, *ids: fn(q, k, v, *ids),
        plain=lambda q, k, v, *ids: reference.flash_attention(
            q, k, v, segment_ids=ids[0] if ids else None
        ),
        inputs=[(1, T, N, H), (1, T, K, H), (1, T, K, H)],
        fixed=[] if ids is None else [ids],
        flops={"forward": 2 * pairs, "backward": 5 * pairs},
        hbm_bytes={d: sum(map(moved, ws)) for d, ws in parts.items()},
        visited=visited,
    )


def _grouped(shape: Grouped, implementation: str, target) -> Problem:
    import jax.numpy as jnp
    import numpy as np
    from jaxrl_kernels import tiles
    from jaxrl_kernels.grouped_matmul import reference, schedule

    from jaxrl.ops.grouped_matmul import GROUPED_MATMUL

    M, E, K, N = shape.M, shape.E, shape.K, shape.N
    case = {"dtype": jnp.bfloat16, "features": (K, N)}
    fn = resolve(GROUPED_MATMUL, implementation, target, **case)
    # Uneven as a router is: drawn once, the same everywhere.
    share = np.random.default_rng(0).dirichlet(np.full(E, 8.0))
    sizes = np.floor(share * M).astype(np.int32)
    sizes[0] += M - sizes.sum()
    product = 2 * M * K * N

    def visited(direction):
        total = 0
        # Rows of x by columns of the output; of the weights' gradient, its rows and columns.
        passes = {"forward": [("forward", K, N)], "backward": [("dx", N, K), ("dw", K, N)]}
        for which, depth, width in passes[direction]:
            tile = tiles.grouped_matmul(
                which, target.gpu, target.capability, "bfloat16", M, depth, width
            )
            columns = -(-width // tile.block_n)
            if which == "dw":
                columns *= -(-depth // tile.block_k)
            total += columns * schedule.blocks_visited(sizes.tolist(), M, tile.block_m)
        return total

    return Problem(
        fn=fn,
        plain=reference.grouped_matmul,
        inputs=[(M, K), (E, K, N)],
        fixed=[sizes],
        flops={"forward": product, "backward": 2 * product},
        hbm_bytes={
            "forward": 2 * (M * K + E * K * N + M * N),
            "backward": 2 * (2 * M * K + 2 * E * K * N + 2 * M * N),
        },
        visited=visited,
    )


def small(op: str, shape):
    """The same heads or widths, few enough rows for the plain implementation."""
    if op == "attention":
        docs = [max(1, n * 2048 // shape.T) for n in shape.docs]
        if docs:
            docs[0] += 2048 - sum(docs)
        return dataclasses.replace(shape, T=2048, docs=tuple(docs))
    return dataclasses.replace(shape, M=2048, E=8)


def arrays(shapes, seed=0):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def timed(call, args, *, rounds: int = 7) -> list[float]:
    """Seconds per launch of each round, a round being long enough to hide the launch itself.

    By the wall clock, the device synchronised after each round: JAX has no device events.
    """
    import jax

    jax.block_until_ready(call(*args))
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    launches = max(2, min(50, int(0.05 / (time.perf_counter() - start))))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(launches):
            result = call(*args)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / launches)
    return seconds
