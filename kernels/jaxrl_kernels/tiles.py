"""Tile sizes of the kernels: tuned ones per GPU from `tiles.json`, or what compiles everywhere."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp

TUNED = pathlib.Path(__file__).with_name("tiles.json")


@dataclasses.dataclass(frozen=True)
class Tile:
    """Blocks of queries and keys (attention), warps per program, and loads in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def attention(
    which: str,
    gpu: str | None,
    capability: int | None,
    dtype,
    head_dim: int,
    T: int,
    heads: int = 1,
) -> Tile:
    """Tile of an attention kernel ("forward", "dq", "dkv") for `heads` query heads.

    Tuned for this GPU, dtype and head_dim if `bench/kernels.py` has run there; else defaults that
    fit the shared memory of its architecture. Never longer than T, rounded up to a power of two.
    """
    head = power_of_two(head_dim)
    tuned = tuned_tiles().get(attention_key(which, gpu, dtype, head))
    odd = bool(heads & (heads - 1))  # no power of two: addresses take more registers
    if which == "dkv" and odd and (capability or 0) // 10 == 9:
        tuned = None  # the fastest tile would spill
    itemsize = jnp.dtype(dtype).itemsize
    tile = Tile(**tuned) if tuned else _default(which, capability, itemsize, head, odd)
    longest = power_of_two(T)
    return dataclasses.replace(
        tile, block_q=min(tile.block_q, longest), block_k=min(tile.block_k, longest)
    )


def attention_key(which: str, gpu: str | None, dtype, head: int) -> str:
    """A tuned tile's name in `tiles.json`."""
    return f"attention {which} {gpu} {jnp.dtype(dtype).name} {head}"


@dataclasses.dataclass(frozen=True)
class GroupedTile:
    """A tile of a grouped product: `block_m` rows of one expert; the output is `block_n` wide, and
    `block_k` deep are a step of the sum (of the weights' gradient: the output's height, and
    `block_m` rows are a step). Programs go down `band` tiles before they go right."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    band: int


def grouped_matmul(
    which: str, gpu: str | None, capability: int | None, dtype, M: int, K: int, N: int
) -> GroupedTile:
    """Tile of a grouped product: "forward" and "swiglu" (M x K by K x N), "dx" (the same, with K
    and N those of that product: the weights' N and K), or "dw" (K x M by M x N).

    Tuned for this GPU, dtype and class of K and N if `bench/kernels.py` has run there; else
    defaults that fit the registers and shared memory of its architecture. Never wider or deeper
    than the product, rounded up to a power of two: LoRA's rank 16 takes 16.
    """
    tuned = tuned_tiles().get(grouped_matmul_key(which, gpu, dtype, K, N))
    if tuned:
        tile = GroupedTile(**tuned)
    else:
        tile = _default_grouped(which, capability, jnp.dtype(dtype).itemsize, K, N)
    if which != "dw" and tile.block_n < N and N % tile.block_n and N % (tile.block_n // 2) == 0:
        tile = dataclasses.replace(tile, block_n=tile.block_n // 2)  # no half-empty last column
    return dataclasses.replace(
        tile,
        block_m=min(tile.block_m, power_of_two(M)),
        block_n=min(tile.block_n, power_of_two(N)),
        block_k=min(tile.block_k, power_of_two(K)),
    )


def grouped_matmul_key(which: str, gpu: str | None, dtype, K: int, N: int) -> str:
    """A tuned tile's name in `tiles.json`. K and N of 256 and more are one class each."""
    K, N = min(power_of_two(K), 256), min(power_of_two(N), 256)
    return f"grouped_matmul {which} {gpu} {jnp.dtype(dtype).name} {K} {N}"


def power_of_two(n: int) -> int:
    """The least power of two that is at least n and 16, the smallest side of a product."""
    return max(16, 1 << (n - 1).bit_length())


def _default_grouped(
    which: str, capability: int | None, itemsize: int, K: int, N: int
) -> GroupedTile:
    hopper = capability is not None and capability >= 90  # or later: accumulators leave more room
    if itemsize == 4:
        return GroupedTile(32, 32, 32, 4, 1, 8)
    if min(K, N) <= 64:  # LoRA's products are bound by memory: several small programs per core
        return GroupedTile(*((64, 128, 128) if which == "dw" else (128, 128, 64)), 4, 3, 8)
    if which == "swiglu":  # two accumulators
        return GroupedTile(128, 128, 64, 8, 3, 8) if hopper else GroupedTile(128, 64, 32, 8, 4, 8)
    if which == "dw":
        return GroupedTile(64, 256, 128, 8, 3, 8) if hopper else GroupedTile(32, 128, 128, 8, 4, 8)
    if hopper:
        return GroupedTile(128, 256, 64, 8, 3, 4 if which == "dx" else 8)
    return GroupedTile(128, 128, 32, 8, 4, 8)


@functools.cache
def _file() -> dict[str, dict[str, int]]:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


def tuned_tiles() -> dict[str, dict[str, int]]:
    """The contents of `tiles.json` (empty where there is none), and what `trying` replaces."""
    return _file() | _tried.get()


# Of this thread: several tiles can be compiled side by side.
_tried = contextvars.ContextVar[dict[str, dict[str, int]]]("tried", default={})  # noqa: B039


@contextlib.contextmanager
def trying(key: str, tile: "Tile | GroupedTile") -> Iterator[None]:
    """Kernels traced inside take this tile where `key` names theirs: for tuning."""
    token = _tried.set(_tried.get() | {key: dataclasses.asdict(tile)})
    try:
        yield
    finally:
        _tried.reset(token)


def save(tuned: dict[str, dict[str, int]]) -> None:
    """Add tiles to `tiles.json`."""
    TUNED.write_text(json.dumps(_file() | tuned, indent=1, sort_keys=True) + "\n")
    _file.cache_clear()


def _default(which: str, capability: int | None, itemsize: int, head: int, odd: bool) -> Tile:
    # No spills at the models' shapes, packed or not, and what fits the shared memory of a program:
    # 99 KiB on sm_86 and sm_89, 163 on sm_80, 227 from sm_90 on. Hopper's are the fastest of those
    # timed on an H200; where heads are no power of two, of those that do not spill.
    if itemsize == 4:  # fp32 products run on the ordinary units: small tiles, few registers
        size = 32 if head <= 128 else 16
        return Tile(size, size, 4, 1)
    if head > 128:  # dkv keeps two sums: with more queries it spills, or does not fit 99 KiB
        return Tile(32, 32, 8, 1) if which == "dkv" else Tile(64, 32, 4, 1)
    generation = max(8, (capability or 80) // 10)
    if which == "forward":
        return Tile(128, 64, 8, 3 if capability != 86 and capability != 89 else 2)
    if which == "dq":
        of = {8: Tile(64, 64, 8, 2), 9: Tile(128, 64, 8 if head == 128 else 4, 3)}
        return of.get(generation, Tile(64, 64, 4, 2))
    if head == 128:
        of = {8: Tile(64, 64, 8, 2), 9: Tile(32, 128, 8, 2) if odd else Tile(32, 64, 4, 2)}
        of |= {10: Tile(32, 64, 8, 2)}  # of fewer than 64 keys sm_100's own products cannot be
        return of.get(generation, Tile(64, 32, 4, 2))
    of = {8: Tile(32, 64, 4, 2), 9: Tile(64, 64, 4, 2)}
    return of.get(generation, Tile(64, 64, 8, 2))
