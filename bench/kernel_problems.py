"""What `bench/kernels.py` runs: the models' shapes, and each op as a function to differentiate."""

import dataclasses
import math
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
    """One product of a MoE layer: M rows over E experts of K x N; `rank` of a LoRA adapter on it.

    features: D and F of the model, which decide what runs its products, also those of an adapter.
    """

    model: str
    features: tuple[int, int]
    K: int
    N: int
    rank: int = 0
    M: int = 131072  # 16384 tokens, 8 experts each
    E: int = 128

    @property
    def name(self) -> str:
        rank = f" R{self.rank}" if self.rank else ""
        return f"{self.model} M{self.M} E{self.E} K{self.K} N{self.N}{rank}"


# Documents as they come in chats: a few long ones, many short ones.
MIXED = (4096, 37, 512, 1900, 255, 3000, 1, 1100, 640, 2048, 75, 1024, 1696)
MODELS = {  # D and F of their experts
    "Qwen3-30B-A3B": (2048, 768),
    "Qwen3-235B-A22B": (4096, 1536),
    "INTELLECT-3": (4096, 1408),
}
RANK = 16
UP = [Grouped(model, (D, F), D, F) for model, (D, F) in MODELS.items()]  # of gate too
DOWN = [Grouped(model, (D, F), F, D) for model, (D, F) in MODELS.items()]
SHAPES: dict[str, list] = {
    "attention": [
        Attention("Qwen3-0.6B", 16384, 16, 8, 128),
        Attention("Qwen3-4B/Llama-3.1-8B", 16384, 32, 8, 128),
        Attention("Qwen3-4B/Llama-3.1-8B", 16384, 32, 8, 128, MIXED),
        Attention("Qwen3-4B/Llama-3.1-8B", 65536, 32, 8, 128),
        Attention("Qwen3-30B-A3B", 16384, 32, 4, 128),
        Attention("Qwen3-235B-A22B", 16384, 64, 4, 128),
        Attention("INTELLECT-3", 16384, 96, 8, 128),
        Attention("Llama-3.2-1B", 16384, 32, 8, 64),
        Attention("Llama-3.2-1B", 16384, 32, 8, 64, MIXED),
        Attention("Llama-3.2-3B", 16384, 24, 8, 128),
    ],
    "grouped_matmul": [
        *UP,
        *DOWN,
        *(  # of adapters, alone: up's two and down's two
            Grouped("Qwen3-30B-A3B LoRA", MODELS["Qwen3-30B-A3B"], K, N)
            for K, N in ((2048, RANK), (RANK, 768), (768, RANK), (RANK, 2048))
        ),
    ],
    "grouped_lora_matmul": [dataclasses.replace(s, rank=RANK) for s in (*UP, *DOWN)],
    "grouped_swiglu": UP,
}
assert sum(MIXED) == 16384


@dataclasses.dataclass(frozen=True)
class Problem:
    """fn(*inputs, *frozen, *fixed), differentiated in its inputs; `plain` is what it should equal.

    inputs, frozen: shapes, bf16. fixed: arrays. flops, hbm_bytes: what the mathematics needs, of
    each direction and of whatever implementation: five products for attention's gradients, each
    array read or written once. visited(direction): blocks that our kernels visit.
    """

    fn: Callable
    plain: Callable
    inputs: list[tuple]
    fixed: list[Any]
    flops: dict[str, int]
    hbm_bytes: dict[str, int]
    visited: Callable[[str], int]
    frozen: list[tuple] = dataclasses.field(default_factory=list)


def problem(op: str, shape, implementation: str, target) -> Problem:
    """Raises `Cannot` where the implementation does not take the shape on the target."""
    if op == "attention":
        return _attention(shape, implementation, target)
    return _grouped(op, shape, implementation, target)


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
    try:
        fn = ATTENTION.resolve(implementation, target, **case)[1]
    except ValueError as error:
        raise Cannot(str(error)) from None
    parts = {"forward": ("forward",), "backward": ("dq", "dkv")}
    pairs = 2 * N * H * cost.pairs(docs)
    # Of queries (the output, its gradient), of keys, of a number per query (the log-sum-exp, and
    # which document it is in).
    queries, keys, rows = 2 * T * N * H, 2 * T * K * H, 4 * T * N + 4 * T * bool(shape.docs)

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
        hbm_bytes={
            "forward": 2 * queries + 2 * keys + rows,
            "backward": 4 * queries + 4 * keys + rows,
        },
        visited=visited,
    )


def _grouped(op: str, shape: Grouped, implementation: str, target) -> Problem:
    import jax.numpy as jnp
    import numpy as np
    from jaxrl_kernels import tiles
    from jaxrl_kernels.grouped_matmul import cost, reference, schedule

    from jaxrl.ops.grouped_matmul import composed, resolve_grouped_matmul

    M, E, K, N, R = shape.M, shape.E, shape.K, shape.N, shape.rank
    try:  # with the model's features, as a layer does: products of an adapter follow the experts'
        ours = resolve_grouped_matmul(
            implementation, target=target, dtype=jnp.bfloat16, features=shape.features
        )
    except ValueError as error:
        raise Cannot(str(error)) from None
    method = {"grouped_lora_matmul": "lora_matmul", "grouped_swiglu": "swiglu"}.get(op, "matmul")
    fn, plain = (getattr(ops, method) for ops in (ours, composed("", reference.grouped_matmul)))
    # Uneven as a router is: drawn once, the same everywhere.
    share = np.random.default_rng(0).dirichlet(np.full(E, 8.0))
    sizes = np.floor(share * M).astype(np.int32)
    sizes[0] += M - sizes.sum()

    w, a, b = (E, K, N), (E, K, R), (E, R, N)
    weights = {"matmul": [w], "lora_matmul": [a, b], "swiglu": [w, w]}[method]
    frozen = [w] if method == "lora_matmul" else []  # the experts, as LoRA trains
    trained, read = (2 * sum(map(math.prod, ws)) for ws in (weights, weights + frozen))  # bytes
    rows_in, rows_out = 2 * M * K, 2 * M * N
    kept = 2 * rows_out if method == "swiglu" else 0  # gate's and up's products, for backward
    # The products of each direction, by our kernels' names: rows x depth x width.
    passes = {
        "matmul": {"forward": [("forward", K, N)], "backward": [("dx", N, K), ("dw", K, N)]},
        "lora_matmul": {
            "forward": [("forward", K, R), ("forward", K, N)],
            "backward": [("dx", N, R), ("dx", N, K), ("dw", K, R), ("dw", R, N)],
        },
        "swiglu": {
            "forward": [("swiglu", K, N)],
            "backward": [("dx", N, K), ("dw", K, N), ("dw", K, N)],
        },
    }[method]
    forward = {
        "matmul": [(K, N)],
        "lora_matmul": [(K, N), (K, R), (R, N)],
        "swiglu": [(K, N)] * 2,
    }[method]
    # Each takes a product for the gradient of its rows, and one for that of its weights.
    backward = [*forward, *(forward[1:] if frozen else forward)]

    def visited(direction):
        total = 0
        # Rows of x by columns of the output; of the weights' gradient, its rows and columns.
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
        fn=_frozen_before(fn, len(weights)) if frozen else fn,
        plain=_frozen_before(plain, len(weights)) if frozen else plain,
        inputs=[(M, K), *weights],
        fixed=[sizes],
        flops={"forward": cost.flops(M, forward), "backward": cost.flops(M, backward)},
        hbm_bytes={
            "forward": rows_in + rows_out + read,
            "backward": 2 * rows_in + rows_out + read + trained + kept,
        },
        visited=visited,
        frozen=frozen,
    )


def _frozen_before(fn: Callable, count: int) -> Callable:
    """`fn(x, *frozen, *weights, sizes)` called as fn(x, *weights, *frozen, sizes)."""
    return lambda x, *rest: fn(x, *rest[count:-1], *rest[:count], rest[-1])


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
