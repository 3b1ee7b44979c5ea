"""What runs beside a transfer, what is gathered ahead and what must not be there, read from short
scheduled programs in the words of XLA's GPU compiler; tests/perf/test_plan.py asks a real one."""

import pytest

from jaxrl.perf.forbidden import forbidden_arrays
from jaxrl.perf.gathered import gathered_alive, layers_ahead
from jaxrl.perf.hardware import gpu
from jaxrl.perf.schedule import hidden_fraction, overlap, overlapped_fraction

H100 = gpu("H100")
W = 4096 * 4096 * 2  # bytes of a gathered matrix
GEMM = 2 * 4096**3 / H100.bf16_flops
SEND = W / (H100.nvlink_bandwidth / 2)

DIMENSIONS = (
    '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}'
)
SYNC = 'backend_config={"collective_backend_config":{"is_sync":true}}'


def gemm(name: str, x: str, w: str) -> str:
    return (
        f"  %{name} = (bf16[4096,4096]{{1,0}}, s8[4194304]{{0}}) custom-call(%{x}, %{w}), "
        f'custom_call_target="__cublas$lt$matmul", backend_config={{{DIMENSIONS}}}\n'
        f"  %{name}.0 = bf16[4096,4096]{{1,0}} get-tuple-element(%{name}), index=0\n"
    )


def start(name: str, op_name: str = "layers/all_gather", more: str = "") -> str:
    return (
        f"  %{name} = ((bf16[512,4096]{{1,0}}), bf16[4096,4096]{{1,0}}) all-gather-start(%shard), "
        f'dimensions={{0}}, metadata={{op_name="{op_name}"}}{more}\n'
    )


def done(name: str, source: str) -> str:
    return f"  %{name} = bf16[4096,4096]{{1,0}} all-gather-done(%{source})\n"


def program(*lines: str, root: str = "x", before: str = "") -> str:
    return (
        "HloModule hand, is_scheduled=true\n\n"
        f"{before}ENTRY %main (x: bf16[4096,4096], shard: bf16[512,4096]) -> bf16[4096,4096] {{\n"
        "  %x = bf16[4096,4096]{1,0} parameter(0)\n"
        "  %shard = bf16[512,4096]{1,0} parameter(1)\n"
        + "".join(lines)
        + f"  ROOT %out = bf16[4096,4096]{{1,0}} bitcast(%{root})\n}}\n"
    )


def test_a_product_between_start_and_done_hides_a_gather():
    text = program(start("s"), gemm("a", "x", "x"), done("d", "s"), gemm("b", "a.0", "d"))
    (gather,) = overlap(text, H100)
    assert (gather.kind, gather.bytes, gather.calls) == ("all-gather", W, 1)
    assert gather.is_async and gather.covered
    assert gather.compute_seconds == pytest.approx(GEMM)
    assert gather.transfer_seconds == pytest.approx(SEND) and SEND < GEMM
    assert gather.exposed_seconds == 0
    assert overlapped_fraction([gather]) == hidden_fraction([gather]) == 1.0


def test_nothing_between_hides_nothing():
    (gather,) = overlap(program(start("s"), done("d", "s"), gemm("b", "x", "d")), H100)
    assert gather.is_async and not gather.covered
    assert gather.exposed_seconds == pytest.approx(SEND)
    assert overlapped_fraction([gather]) == hidden_fraction([gather]) == 0.0


def test_a_little_is_not_compute():
    """A sum of one shard's size is there, but the wait stays."""
    little = "  %y = bf16[512,4096]{1,0} add(%shard, %shard)\n"
    (gather,) = overlap(program(start("s"), little, done("d", "s")), H100)
    assert 0 < gather.compute_seconds < 0.5 * SEND and not gather.covered
    assert gather.exposed_seconds == pytest.approx(SEND - gather.compute_seconds)


def test_synchronous_gathers_are_not_hidden():
    plain = start("s").replace("((bf16[512,4096]{1,0}), bf16[4096,4096]{1,0})", "bf16[4096,4096]")
    plain = plain.replace("all-gather-start", "all-gather")
    for lines in ((plain,), (start("s", more=f", {SYNC}"), done("d", "s"))):
        (gather,) = overlap(program(gemm("a", "x", "x"), *lines), H100)
        assert not gather.is_async and not gather.covered
        assert gather.bytes == W and gather.exposed_seconds == pytest.approx(SEND)


def test_transfers_queue_behind_each_other():
    """Two gathers start at once beside one product: the second has to wait for the first."""
    text = program(
        start("s"), start("t"), gemm("a", "x", "x"), done("d", "s"), done("e", "t"), root="e"
    )
    first, second = overlap(text, H100)
    assert first.covered and second.covered
    assert first.exposed_seconds == 0
    assert second.exposed_seconds == pytest.approx(2 * SEND - GEMM)
    assert hidden_fraction([first, second]) == pytest.approx(1 - (2 * SEND - GEMM) / SEND / 2)


def test_wrapped_transfers():
    wrapped = """%wrapped (p: bf16[4096,4096]) -> bf16[512,4096] {
  %p = bf16[4096,4096]{1,0} parameter(0)
  ROOT %rs = bf16[512,4096]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

"""
    text = program(
        "  %s = ((bf16[4096,4096]{1,0}), bf16[512,4096]{1,0}) async-start(%x), calls=%wrapped\n",
        gemm("a", "x", "x"),
        "  %d = bf16[512,4096]{1,0} async-done(%s)\n",
        before=wrapped,
    )
    (scatter,) = overlap(text, H100)
    assert (scatter.kind, scatter.bytes, scatter.covered) == ("reduce-scatter", W, True)
    assert overlapped_fraction([scatter]) == 1.0  # no all-gather is exposed
    assert overlapped_fraction([scatter], "reduce-scatter") == 1.0


def test_the_vocabularys_gathers_are_told_apart():
    text = program(
        start("s"), gemm("a", "x", "x"), done("d", "s"), start("t", "step/head/all_gather"),
        done("e", "t"),
    )  # fmt: skip
    found = overlap(text, H100)
    assert overlapped_fraction(found) == 1.0
    assert overlapped_fraction(found, where="") == 0.5
    assert overlapped_fraction(found, where="/head/") == 0.0


def loop(body: list[str], carried: str, results: str, trips: int = 6) -> tuple[str, str]:
    """(computations, the while's line) of a loop over (index, x, carried, shard)."""
    shape = f"(s32[], bf16[4096,4096], {carried}, bf16[512,4096])"
    computations = (
        f"%body (t: {shape}) -> {shape} {{\n"
        f"  %t = {shape} parameter(0)\n"
        "  %i = s32[] get-tuple-element(%t), index=0\n"
        "  %y = bf16[4096,4096]{1,0} get-tuple-element(%t), index=1\n"
        f"  %c = {carried} get-tuple-element(%t), index=2\n"
        "  %shard = bf16[512,4096]{1,0} get-tuple-element(%t), index=3\n"
        + "".join(body)
        + f"  ROOT %next = {shape} tuple(%i, {results}, %shard)\n}}\n\n"
        f"%cond (t.1: {shape}) -> pred[] {{\n  %t.1 = {shape} parameter(0)\n"
        "  ROOT %yes = pred[] constant(true)\n}\n\n"
    )
    known = f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    return computations, f"  %w = {shape} while(%init), condition=%cond, body=%body, {known}\n"


MATRIX = "bf16[4096,4096]{1,0}"
LAYERS = "  %zero = s32[] constant(0)\n  %init = tuple_shape tuple(%zero, %x, %first, %shard)\n"


def layers(*body: str, carried: str = MATRIX, results: str, before=(), trips=6) -> str:
    computations, line = loop(list(body), carried, results, trips)
    shape = f"(s32[], bf16[4096,4096], {carried}, bf16[512,4096])"
    out = f"  %z = {MATRIX} get-tuple-element(%w), index=1\n"
    init = LAYERS.replace("tuple_shape", shape)
    return program(*before, init, line, out, root="z", before=computations)


def test_loops_multiply_and_compute_counts_through_them():
    """Each layer gathers for itself; the gather before the loop runs beside all of it."""
    text = layers(
        start("s"), gemm("a", "y", "y"), done("d", "s"), gemm("b", "a.0", "d"),
        results="%b.0, %c", before=("  %first = bf16[4096,4096]{1,0} bitcast(%x)\n", start("o")),
    ).replace("  ROOT %out", done("p", "o") + "  ROOT %out")  # fmt: skip
    inner, outer = sorted(overlap(text, H100), key=lambda o: -o.calls)
    assert inner.calls == 6 and inner.compute_seconds == pytest.approx(GEMM)
    assert outer.calls == 1 and outer.compute_seconds == pytest.approx(12 * GEMM)
    assert gathered_alive(text) == 2 * W


def test_a_gather_that_ends_in_the_next_iteration():
    """Started in one iteration, carried in flight and done in the next one."""
    flight = "((bf16[512,4096]{1,0}), bf16[4096,4096]{1,0})"
    text = layers(
        done("d", "c"), start("s"), gemm("a", "y", "d"), carried=flight, results="%a.0, %s",
        before=(start("first"),),
    )  # fmt: skip
    (gather,) = overlap(text, H100)
    assert gather.is_async and gather.calls == 6
    assert gather.compute_seconds == pytest.approx(GEMM) and gather.exposed_seconds == 0


def test_a_done_without_a_start_is_an_error():
    with pytest.raises(ValueError, match="d ends a transfer whose start is not found"):
        overlap(program(done("d", "x")), H100)


def test_only_scheduled_programs_are_read():
    with pytest.raises(ValueError, match="not scheduled"):
        overlap(program().replace(", is_scheduled=true", ""), H100)


def test_kernels_count_what_they_are_said_to_do():
    kernel = (
        "  %k = bf16[4096,4096]{1,0} custom-call(%x), "
        'custom_call_target="mosaic_gpu_v2", metadata={op_name="attend"}\n'
    )
    text = program(start("s"), kernel, done("d", "s"))
    (bytes_only,) = overlap(text, H100)
    assert bytes_only.compute_seconds == pytest.approx(2 * W / H100.memory_bandwidth)
    (told,) = overlap(text, H100, kernel_flops=lambda c: 1e12 if c.op_name == "attend" else None)
    assert told.compute_seconds == pytest.approx(1e12 / H100.bf16_flops)


def test_a_slice_of_a_stack_moves_the_slice():
    fused = """%fused (p: bf16[36,512,4096], n: s32[]) -> bf16[1,512,4096] {
  %p = bf16[36,512,4096]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %ds = bf16[1,512,4096]{2,1,0} dynamic-slice(%p, %n, %n, %n), dynamic_slice_sizes={1,512,4096}
}

"""
    text = program(
        "  %stack = bf16[36,512,4096]{2,1,0} parameter(2)\n  %n = s32[] constant(0)\n",
        start("s"),
        "  %f = bf16[1,512,4096]{2,1,0} fusion(%stack, %n), kind=kLoop, calls=%fused\n",
        done("d", "s"),
        before=fused,
    )
    (gather,) = overlap(text, H100)
    assert gather.compute_seconds == pytest.approx(2 * W / 8 / H100.memory_bandwidth, rel=1e-6)


def test_layers_ahead():
    first = "  %first = bf16[4096,4096]{1,0} bitcast(%x)\n"
    own = layers(
        start("s"), done("d", "s"), gemm("a", "y", "d"), results="%a.0, %c", before=(first,)
    )
    assert gathered_alive(own) == W and layers_ahead(own, W) == 0.0
    # The next layer's weights come while this layer's, gathered one iteration ago, are in use.
    ahead = layers(
        start("s"), gemm("a", "y", "c"), done("d", "s"), results="%a.0, %d",
        before=(start("f"), done("first", "f")),
    )  # fmt: skip
    assert layers_ahead(ahead, W) == 1.0
    two = ahead.replace(gemm("a", "y", "c"), start("u") + gemm("a", "y", "c") + done("e", "u"))
    assert layers_ahead(two, W) == 2.0
    assert gathered_alive(program(start("s", "step/head/all_gather"), done("d", "s"))) == 0


def held(dims: str) -> str:
    return program(f"  %big = f32[{dims}] broadcast(%x), dimensions={{}}\n")


T, V, E, F = 16384, 151936, 128, 768


@pytest.mark.parametrize(
    ("dims", "wrong"),
    [
        (f"{T},{V}", ["logits"]),
        (f"1,{V},{T}", ["logits"]),
        (f"{T * V}", ["logits"]),
        (f"32,512,{V}", ["logits"]),
        (f"{8 * T},{V // 8}", ["logits"]),  # all devices' tokens by a share of the vocabulary
        (f"512,{V}", []),  # a chunk
        (f"{V // 8},2560", []),  # a shard of the table
        (f"94,{4 * T},4096", []),  # the layers' inputs: larger than logits
        (f"{E},2048,{F}", ["experts"]),
        (f"2048,{E * F}", ["experts"]),
        (f"{E * 2048},{F}", ["experts"]),
        (f"{E * 2048 * F}", ["experts"]),
        (f"{E},4,512,{F}", ["experts"]),
        (f"{E},1024,{F}", []),  # of fewer tokens
        (f"{E},2560,{F}", []),  # a layer's weights, as long as rows are not features
        (f"48,16,2560,{F}", []),
        (f"{8 * T},{F}", []),  # rows sorted by expert
        (f"{4 * T},64,{E}", []),  # heads, of as many dimensions as there are experts
        (f"{T},{E}", []),  # the router's scores
        ("4096,4096", []),  # like an argument
    ],
)
def test_forbidden_arrays(dims, wrong):
    found = forbidden_arrays(
        held(dims), tokens=T, vocab=V, vocab_shards=8, experts=E, rows=2048, features=(2560, F)
    )
    assert list(found) == wrong
    for arrays in found.values():
        assert [",".join(map(str, a.dims)) for a in arrays] == [dims]
