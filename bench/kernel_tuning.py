"""Tiles of our kernels, timed on the GPU that is here: `bench/kernels.py --tune`."""

import concurrent.futures
import dataclasses
import functools
import statistics
import sys

from kernel_problems import SHAPES, arrays, timed

# Of attention, for bf16: (block_q, block_k, warps, stages); none spills on Hopper.
ATTENTION_TILES = {
    ("forward", 128): [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)],
    ("dq", 128): [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2)],
    ("dkv", 128): [(64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)],
    ("forward", 64): [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("dq", 64): [(64, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)],
    ("dkv", 64): [(64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2)],
}
# Of grouped products: (block_m, block_n, block_k, warps, stages, band).
GROUPED_TILES = {
    "forward": [
        *((128, 256, 64, 8, 3, 8), (128, 128, 64, 8, 3, 8), (128, 128, 64, 4, 4, 8)),
        *((128, 256, 64, 8, 4, 8), (256, 128, 64, 8, 3, 8), (128, 256, 64, 8, 3, 4)),
    ],
    "dw": [
        *((64, 256, 128, 8, 3, 8), (64, 128, 128, 8, 3, 8), (64, 128, 256, 8, 3, 8)),
        *((64, 128, 128, 4, 4, 8), (128, 128, 128, 8, 2, 8)),
    ],
}


def tune(ops: list[str]) -> None:
    """Time the tiles of each kernel here and keep the fastest in `tiles.json`.

    All are compiled first, side by side, and timed after that, one by one.
    """
    from jaxrl_kernels import tiles

    from jaxrl.ops.registry import Target

    target = Target.here()
    trials = []
    if "attention" in ops:
        for (which, H), candidates in ATTENTION_TILES.items():
            key = tiles.attention_key(which, target.gpu, "bfloat16", H)
            kernel = functools.partial(attention_kernel, which, H, target)
            trials += [(key, tiles.Tile(*c), kernel) for c in candidates]
    if any(op.startswith("grouped") for op in ops):
        for which, same in (("forward", "forward"), ("dx", "forward"), ("dw", "dw")):
            key = tiles.grouped_matmul_key(which, target.gpu, "bfloat16", 2048, 768)
            kernel = functools.partial(grouped_kernel, which, target)
            trials += [(key, tiles.GroupedTile(*c), kernel) for c in GROUPED_TILES[same]]

    def compiled(trial):
        key, tile, kernel = trial
        try:
            with tiles.trying(key, tile):
                return kernel()
        except Exception as error:
            print(f"{key} {tile}: {str(error)[:100]}", file=sys.stderr)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        calls = list(pool.map(compiled, trials))
    times: dict[str, list] = {}
    for (key, tile, _), call in zip(trials, calls, strict=True):
        if call is not None:
            try:
                seconds = statistics.median(timed(*call, rounds=3))
            except Exception as error:  # more shared memory than this GPU has, say
                print(f"{key} {tile}: {str(error)[:100]}", file=sys.stderr)
            else:
                times.setdefault(key, []).append((seconds, tile))
    for of_key in times.values():
        of_key.sort(key=lambda pair: pair[0])
    for key, of_key in times.items():
        said = "; ".join(
            f"{dataclasses.astuple(tile)} {1e3 * seconds:.3f} ms" for seconds, tile in of_key
        )
        print(f"{key}: {said}", file=sys.stderr)
    tiles.save({key: dataclasses.asdict(of_key[0][1]) for key, of_key in times.items()})


def attention_kernel(which: str, H: int, target):
    """(compiled kernel, arguments) at T 16384, N 16, K 8."""
    import jax
    import jax.numpy as jnp
    from jaxrl_kernels.flash_attention import triton

    T, N, K = 16384, 16, 8
    static = triton.Static(H**-0.5, True, False, target.gpu, target.capability)
    q, k, v, dout = arrays([(1, T, N, H), (1, T, K, H), (1, T, K, H), (1, T, N, H)])
    rows = jnp.full((1, N, T), 10.0)
    kernel, args = {
        "forward": (triton.forward, (q, k, v, None, None)),
        "dq": (triton.backward_dq, (q, k, v, None, None, dout, rows, rows)),
        "dkv": (triton.backward_dkv, (q, k, v, None, None, dout, rows, rows)),
    }[which]
    return jax.jit(lambda *args: kernel(static, *args)).lower(*args).compile(), args


def grouped_kernel(which: str, target):
    """(compiled kernel, arguments) at Qwen3-30B-A3B's shapes."""
    import jax
    import jax.numpy as jnp
    from jaxrl_kernels.grouped_matmul import triton

    shape = SHAPES["grouped_matmul"][0]
    M, E, K, N = shape.M, shape.E, shape.K, shape.N
    static = triton._Static(target.gpu, target.capability)
    sizes = jnp.full(E, M // E, jnp.int32)
    x, w, dy = arrays([(M, K), (E, K, N), (M, N)])
    call, args = {
        "forward": (
            lambda x, w, s: triton.rows_product(static, "forward", [(x, w)], s),
            (x, w, sizes),
        ),
        "dx": (
            lambda dy, w, s: triton.rows_product(static, "dx", [(dy, w)], s),
            (dy, w, sizes),
        ),
        "dw": (
            lambda x, dy, s: triton.weights_gradient(static, x, dy, s, jnp.float32),
            (x, dy, sizes),
        ),
    }[which]
    return jax.jit(call).lower(*args).compile(), args
