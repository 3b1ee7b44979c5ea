"""Attention over a sequence that devices share, against one device that has it whole.

Value and gradients on virtual CPU devices, with the Triton kernels in their interpreter; what a
ring costs and overlaps, in the program compiled for eight H100s (this file as a script).
"""

import collections
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jaxprs import primitives
from jaxrl_kernels import interpreter, tiles
from jaxrl_kernels.flash_attention import cost
from jaxrl_kernels.flash_attention.reference import flash_attention as plain
from jaxrl_kernels.launch import interpreted
from scripts import output_of

from jaxrl.ops import attention_xla, registry
from jaxrl.ops.registry import Target
from jaxrl.parallel.context import check_context, context_attention, sequence_order
from jaxrl.parallel.mesh import make_mesh
from jaxrl.train.remat import remat_policy

CPU = Target("cpu")
ANY_GPU = Target("gpu", "a GPU that no tile was tuned for", 90)
H100 = Target("gpu", "NVIDIA H100 80GB HBM3", 90)
SHARD = PartitionSpec(None, "context")
B, T, H = 2, 64, 8
# Of one token, on the border of shards of 16 and of chunks of 8 and 4, across them, and whole rows.
DOCUMENTS = ((7, 1, 1, 7, 20, 11, 1, 16), (T,))


def packed_ids(*rows):
    """Lengths of the documents of each row -> segment ids [B, T]."""
    return jnp.stack([jnp.repeat(jnp.arange(len(r)), np.array(r)) for r in rows])


def resolve(method, size, attention, target=CPU, dtype=jnp.float32, N=4, K=1, packed=False, T=T):
    return context_attention(
        method,
        size=size,
        attention=attention,
        target=target,
        dtype=dtype,
        head_dim=H,
        num_heads=N,
        num_kv_heads=K,
        packed=packed,
        seq_len=T,
    )


def split(fn, size):
    """fn over shards of `size` devices, along the sequence."""
    mesh = make_mesh(jax.devices()[:size], context=size)
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=SHARD, out_specs=SHARD, check_vma=False))


def pulled(attend):
    """(q, k, v, dout, ids) -> out, dq, dk, dv."""

    def run(q, k, v, dout, ids):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return out, *vjp(dout)

    return run


@functools.cache
def shared(method, size, attention, T=T, **case):
    """`pulled` attention over whole rows that `size` devices share."""
    run = split(pulled(resolve(method, size, attention, T=T, **case).fn), size)
    order = sequence_order(method, T, size)
    order = np.arange(T) if order is None else order

    def whole(*arrays):
        arrays = (None if a is None else a[:, order] for a in arrays)
        return [a[:, np.argsort(order)] for a in run(*arrays)]

    return whole


@functools.cache
def arrays(N, K, T=T, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]


one_device = jax.jit(pulled(lambda q, k, v, ids: plain(q, k, v, segment_ids=ids)))


def check(got, inputs, ids, tolerance=3e-6):
    """Each tensor equals one device's, relative to its largest value."""
    expected = one_device(*(a.astype(jnp.float32) for a in inputs), ids)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == inputs[0].dtype
        error = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b)))
        assert error < tolerance * np.max(np.abs(b)), (name, error)


@pytest.fixture
def small_blocks(monkeypatch):
    """XLA's blocks smaller than a chunk, that do not divide it."""
    monkeypatch.setattr(attention_xla, "block_size", lambda seq_len: 3)


@pytest.mark.parametrize(
    ("method", "size", "attention", "N", "K", "packed"),
    [
        ("ring", 2, "xla", 4, 1, True),
        ("ring", 4, "reference", 4, 4, False),
        ("ring", 8, "xla", 4, 1, True),
        ("ring", 8, "xla", 3, 3, False),
        ("ulysses", 2, "xla", 4, 4, True),
        ("ulysses", 4, "xla", 8, 2, False),
        ("ulysses", 8, "reference", 8, 2, True),
        ("ulysses", 8, "reference", 8, 1, False),
    ],
)
def test_equals_one_device(method, size, attention, N, K, packed, small_blocks):
    ids = packed_ids(*DOCUMENTS) if packed else None
    inputs = arrays(N, K)
    check(shared(method, size, attention, N=N, K=K, packed=packed)(*inputs, ids), inputs, ids)


@settings(deadline=None, max_examples=15, derandomize=True, database=None)
@given(st.lists(st.integers(0, 2), min_size=2 * T, max_size=2 * T), st.integers(0, T))
def test_any_documents_in_a_ring(ids, half):
    """Ids that come back are other documents; sorting a part of each row makes long ones."""
    ids = np.array(ids).reshape(2, T)
    ids[:, half:] = np.sort(ids[:, half:])
    inputs, ids = arrays(2, 1), jnp.asarray(ids)
    check(shared("ring", 4, "reference", N=2, K=1, packed=True)(*inputs, ids), inputs, ids)


@pytest.mark.parametrize(("method", "N", "K"), [("ring", 4, 1), ("ulysses", 8, 2)])
def test_bf16_within_its_rounding(method, N, K):
    inputs, ids = arrays(N, K, dtype="bfloat16"), packed_ids(*DOCUMENTS)
    got = shared(method, 4, "xla", N=N, K=K, packed=True, dtype="bfloat16")(*inputs, ids)
    check(got, inputs, ids, tolerance=2**-7)


def test_kernels_in_a_ring_visit_what_the_mask_leaves():
    """In the interpreter, their products counted: half of the square, the same on each device."""
    size, T, N = 2, 96, 2
    inputs = arrays(N, 1, T)
    with interpreted():
        run = shared("ring", size, "triton", target=ANY_GPU, N=N, K=1, T=T)
        got, products = interpreter.count_products(run, *inputs, None)
    check(got, inputs, None)
    expected, chunk = 0, T // (2 * size)
    for which, products_per_block in cost.PRODUCTS.items():
        blocks = 0
        for length, causal, times in ((2 * chunk, True, 1), (chunk, False, 2 * (size - 1))):
            tile = tiles.attention(which, None, 90, jnp.float32, H, length)
            sides = tile.block_q, tile.block_k
            blocks += times * cost.visited_blocks([length], *sides, causal=causal)
        expected += size * B * N * blocks * products_per_block
    assert sum(products.values()) == expected


@pytest.mark.filterwarnings("ignore:.*encountered in (divide|log2)")  # queries that see nothing
def test_kernels_in_a_ring_with_documents():
    """bf16 in, sums over the ring in fp32; a chunk (24) is no whole number of tiles (16)."""
    inputs, ids = arrays(2, 1, 96, "bfloat16"), packed_ids((30, 1, 1, 16, 40, 8), (95, 1))
    with interpreted():
        case = {"target": ANY_GPU, "dtype": "bfloat16", "N": 2, "K": 1, "T": 96}
        got = shared("ring", 2, "triton", packed=True, **case)(*inputs, ids)
    check(got, inputs, ids, tolerance=2**-7)


def test_a_zig_zag_pairs_early_chunks_with_late_ones():
    order = sequence_order("ring", 24, 3)
    assert order is not None
    expected = [[0, 1, 2, 3, 20, 21, 22, 23], [4, 5, 6, 7, 16, 17, 18, 19], range(8, 16)]
    np.testing.assert_array_equal(order.reshape(3, 8), expected)
    # Every device's queries see equally many keys, but for the rounding of a triangle.
    assert np.ptp(np.sum(order.reshape(3, 8), axis=1)) == 0
    assert sequence_order("ulysses", 24, 3) is None and sequence_order("ring", 24, 1) is None


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_one_device_is_plain_attention(method):
    run = pulled(resolve(method, 1, "reference").fn)
    seen = primitives(jax.make_jaxpr(run)(*arrays(4, 1), None).jaxpr)
    assert not {"ppermute", "all_to_all", "all_gather", "axis_index"} & set(seen)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("rings", {}, "unknown context method 'rings'; one of ring, ulysses"),
        ("ring", {"seq_len": 72}, r"axis 8 \(ring\) does not split seq_len 72 .* of \[1, 2, 3, 4,"),
        ("ring", {"seq_len": 72}, "or a multiple of 16 tokens"),
        ("ulysses", {"seq_len": 60}, r"axis 8 \(ulysses\) .* seq_len 60 .* use one of \[1, 2, 3,"),
        (
            "ulysses",
            {"num_heads": 12},
            r"num_heads 12 .*; use one of \[1, 2, 4, 12\], or .* 'ring'",
        ),
        (
            "ulysses",
            {"num_heads": 24, "num_kv_heads": 6},
            r"num_kv_heads 6; use one of \[1, 2, 3, 6, 12",
        ),
        ("ring", {"size": 0}, "axis 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(method, change, message):
    case = {"size": 8, "seq_len": 96, "num_heads": 16, "num_kv_heads": 4}
    with pytest.raises(ValueError, match=message):
        check_context(method, **(case | change))


def test_a_ring_of_any_heads_is_fine():
    check_context("ring", size=8, seq_len=96, num_heads=3, num_kv_heads=3)


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
@pytest.mark.parametrize("target", [CPU, H100])
def test_kernels_that_cannot_do_a_ring_are_refused(name, target):
    message = f"attention '{name}' gives no log-sum-exp of a block .*'ulysses'.*; use .*'xla'"
    with pytest.raises(ValueError, match=message):
        resolve("ring", 2, name, target, jnp.bfloat16)


def test_auto_takes_what_is_validated(monkeypatch):
    for sure in (True, False):
        monkeypatch.setattr(registry, "is_validated", lambda *_, sure=sure: sure)
        assert resolve("ulysses", 2, "auto", H100, jnp.bfloat16).name == "cudnn"
        if sure:
            assert resolve("ring", 2, "auto", H100, jnp.bfloat16).name == "triton"
        else:
            with pytest.raises(ValueError, match="use 'triton', whose tests have not run there"):
                resolve("ring", 2, "auto", H100, jnp.bfloat16)


def layer(method, policy):
    """(shapes that a layer keeps for backward, kernels that run in all)."""
    with interpreted():
        attend = resolve(method, 4, "triton", ANY_GPU, N=8, K=4).fn
        kept = []

        def run(q, k, v, dout):
            fn = jax.checkpoint(lambda *x: attend(*(2 * a for a in x), None), policy=policy)
            out, vjp = jax.vjp(fn, q, k, v)
            kept.extend(a.shape for a in jax.tree.leaves(vjp.opaque_residuals))
            return out, *vjp(dout)

        jaxpr = jax.make_jaxpr(split(run, 4))(*arrays(8, 4))
    return sorted(kept), primitives(jaxpr.jaxpr)["pure_callback"]


@pytest.mark.parametrize(
    ("method", "kernels", "out"),
    [("ring", 5, (B, T // 4, 8, H)), ("ulysses", 1, (B, T, 2, H))],
)
def test_selective_checkpointing_does_not_run_attention_again(method, kernels, out):
    """A ring's kernels: on the own keys, and two in the loop and the last visit each."""
    _, b, n, _ = out
    kept, runs = layer(method, remat_policy("selective"))
    assert kept == sorted([(B, n, b), out])
    assert runs == 3 * kernels
    assert layer(method, remat_policy("recompute")) == ([], 4 * kernels)


@pytest.mark.slow
def test_a_ring_of_eight_h100():
    """At 8 x 32768 tokens: an eighth of the work, permutes beside it, memory of a few arrays."""
    seen = output_of(__file__, "H100")
    flops = {which: cost.flops(which, 1, 32, 128, [8 * 32768]) for which in cost.PRODUCTS}
    assert seen["flops"] == sum(flops.values()) / 8
    assert seen["kernels_of_collectives"] and all(n > 0 for n in seen["kernels_of_collectives"])
    # Keys and values: on the way while the own ones are used, and then seven times, of which the
    # program's two passes share the first; the gradients of keys and values: eight times.
    permutes = [c for c in seen["collectives"] if c["kind"] == "collective-permute"]
    assert permutes == seen["collectives"] and all(c["is_async"] for c in permutes)
    calls = collections.Counter()
    for permute in permutes:
        calls[permute["bytes"]] += permute["calls"]
    kv = 2 * 32768 * 8 * 128
    assert 13 <= calls[2 * kv] <= 14 and calls[4 * kv] == 8 and len(calls) == 2
    q_bytes = 2 * 32768 * 32 * 128
    assert seen["temp"] < 7 * q_bytes  # the scores of one head: 16 times as much
    assert seen["spill_bytes"] == 0


def main(gpu):
    import dataclasses

    from jaxrl_kernels import launch, resources

    from jaxrl.perf import compile_only, hlo

    devices = compile_only.topology(gpu, 8)
    mesh = make_mesh(devices, context=8)
    attend = context_attention(
        "ring",
        size=8,
        attention="triton",
        target=Target.of(devices[0]),
        dtype=jnp.bfloat16,
        head_dim=128,
        num_heads=32,
        num_kv_heads=8,
        packed=False,
        seq_len=8 * 32768,
    )
    run = jax.shard_map(
        lambda *x: pulled(attend.fn)(*x, None),
        mesh=mesh,
        in_specs=SHARD,
        out_specs=SHARD,
        check_vma=False,
    )
    arrays = (
        jax.ShapeDtypeStruct(
            (1, 8 * 32768, n, 128), jnp.bfloat16, sharding=NamedSharding(mesh, SHARD)
        )
        for n in (32, 8, 8, 32)
    )
    with compile_only.as_device(mesh), launch.collect() as found:
        lowered = jax.jit(run).lower(*arrays)
    program = compile_only.compile_for(lowered)
    text = program.as_text()
    summary = hlo.summarize(text)
    said = {
        "temp": compile_only.memory(program).temp,
        "flops": sum((c.flops or 0) * c.count for c in summary.call_sites),
        "collectives": [dataclasses.asdict(c) for c in summary.collectives],
        "spill_bytes": sum(resources.resources(k).spill_bytes for k in found),
        "kernels_of_collectives": kernels_of_collectives(text),
    }
    print(json.dumps(said))


def kernels_of_collectives(text: str) -> list[int]:
    """How many kernel launches stand between the start and the done of each collective-permute."""
    counts, started = [], {}
    for line in text.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if " collective-permute-start(" in rest:
            started[name] = 0
        elif " collective-permute-done(" in rest:
            counts.append(started.pop(rest.split("collective-permute-done(")[1].split(")")[0]))
        elif " custom-call(" in rest or "kind=kCustom" in rest:  # with its slices fused into it
            started = {name: n + 1 for name, n in started.items()}
    return counts


if __name__ == "__main__":
    import sys

    from jaxrl.perf import compile_only

    compile_only.prepare_environment()
    main(sys.argv[1])
