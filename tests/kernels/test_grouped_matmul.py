"""Grouped products against their fp32 reference: values and every gradient, per tensor and expert.

The Triton kernels, ours and tokamax's, run in the interpreter; the CPU's own path runs as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_tokamax import A6000, interpreted_tokamax
from jaxrl_kernels import interpreter, launch, tiles
from jaxrl_kernels.grouped_matmul import cost, reference, schedule, triton
from jaxrl_kernels.tiles import GroupedTile
from validation import skip

from jaxrl.ops import grouped_matmul_xla
from jaxrl.ops.grouped_matmul import GROUPED_MATMUL, grouped_matmul, resolve_grouped_matmul
from jaxrl.ops.registry import Target
from jaxrl.ops.tokamax_kernels import ragged_dot_implementation

# One rounding of the result, relative to an expert's largest value. The interpreter cuts bf16 off.
ROUNDING = {"float32": 2**-20, "float16": 2**-10, "bfloat16": 2**-7}

CASES = {  # sizes of the groups, M, K, N, dtype of x, dtype of w
    "uneven": ((3, 40, 20, 7), 70, 40, 24, "float32", "float32"),
    "empty_first_and_last": ((0, 33, 0, 0, 31, 0), 70, 32, 48, "bfloat16", "float32"),
    "one_giant": ((0, 0, 150, 0), 150, 64, 32, "bfloat16", "bfloat16"),
    "no_rows_at_all": ((0, 0, 0), 40, 16, 16, "float16", "float32"),
    "no_rows_behind": ((17, 47), 64, 80, 16, "float16", "float16"),
    "one_row": ((1, 0), 1, 8, 8, "float32", "float32"),
    "one_expert": ((5,), 9, 16, 40, "bfloat16", "float32"),
    "rank_16": ((20, 13, 0, 9), 48, 96, 16, "bfloat16", "float32"),
    "of_rank_16": ((20, 13, 0, 9), 48, 16, 96, "bfloat16", "float32"),
}
OPS = ("grouped_matmul", "grouped_lora_matmul", "grouped_swiglu")
H100, CPU = Target("gpu", "NVIDIA H100 80GB HBM3", 90), Target("cpu")
TARGETS = {"triton": Target("gpu", "a GPU that no tile was tuned for", 90), "xla": CPU}
TARGETS["tokamax"] = A6000
# tokamax's are slow in the interpreter: it makes LoRA and SwiGLU of the plain product.
TOKAMAX_FUSED = ("uneven", "empty_first_and_last", "one_giant", "rank_16", "of_rank_16")


def arrays(op, sizes, M, K, N, dtype="float32", w_dtype="float32", seed=0):
    """(operands, group_sizes, cotangent) of an op of `triton`."""
    rng = np.random.default_rng(seed)
    E, R = len(sizes), 16

    def draw(*shape, of=w_dtype):
        return jnp.asarray(rng.standard_normal(shape), of)

    x, dy, w = draw(M, K, of=dtype), draw(M, N, of=dtype), draw(E, K, N)
    more = {
        "grouped_matmul": (),
        "grouped_lora_matmul": (draw(E, K, R) / 4, draw(E, R, N)),
        "grouped_swiglu": (draw(E, K, N),),
    }[op]
    return (x, w, *more), jnp.array(sizes, jnp.int32), dy


def value_and_gradients(function, operands, sizes, dy):
    out, vjp = jax.vjp(lambda *a: function(*a, sizes), *operands)
    return out, *vjp(dy)


def run(implementation, op, operands, sizes, dy):
    """As a layer would on the implementation's target; kernels are interpreted."""
    x, w = operands[:2]
    ops = resolve_grouped_matmul(
        implementation, target=TARGETS[implementation], dtype=x.dtype, features=w.shape[1:]
    )
    by_name = dict(zip(OPS, (ops.matmul, ops.lora_matmul, ops.swiglu), strict=True))
    function = jax.jit(by_name[op]) if implementation == "xla" else by_name[op]
    with interpreted_tokamax() if implementation == "tokamax" else launch.interpreted():
        return value_and_gradients(function, operands, sizes, dy)


def check(got, op, operands, sizes, dy, tolerance):
    """Each result equals the reference's of the same inputs in fp32, expert by expert."""
    exact = [jnp.asarray(a, jnp.float32) for a in (*operands, dy)]
    want = value_and_gradients(getattr(reference, op), exact[:-1], sizes, exact[-1])
    ends = np.cumsum(sizes)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == (operands[0] if i < 2 else operands[i - 1]).dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if i < 2:  # rows: of each expert, and those behind
            assert not a[ends[-1] :].any()
            a, b = np.split(a, ends), np.split(b, ends)
        for e, (mine, right) in enumerate(zip(a, b, strict=True)):
            size = np.max(np.abs(right), initial=0.0)
            assert np.max(np.abs(mine - right), initial=0.0) <= tolerance * size, (i, e)


@pytest.mark.parametrize(
    ("implementation", "op", "case"),
    [(i, op, case) for i in ("triton", "xla") for op in OPS for case in CASES]
    + [("tokamax", OPS[0], case) for case in CASES]
    + [("tokamax", op, case) for op in OPS[1:] for case in TOKAMAX_FUSED],
)
def test_equals_the_reference(implementation, op, case):
    *shape, dtype, w_dtype = CASES[case]
    if implementation == "tokamax" and dtype == "float32":
        dtype = "float16"  # of the two that it takes, the finer one
    inputs = arrays(op, *shape, dtype, w_dtype)
    # LoRA and SwiGLU round on the way too, and the gradients build on what was rounded.
    roundings = 1 if op == "grouped_matmul" else 4
    check(run(implementation, op, *inputs), op, *inputs, ROUNDING[dtype] * roundings)


@st.composite
def shapes(draw, M=96, E=4):
    """(sizes, M, K, N); few shapes, which compile once, and any sizes."""
    cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E, max_size=E)))
    sizes = tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))
    return sizes, M, *draw(st.sampled_from(((24, 40), (40, 16))))


@settings(max_examples=6, deadline=None)
@given(shapes(), st.sampled_from(OPS), st.sampled_from((16, 32)), st.integers(1, 3))
def test_triton_on_drawn_shapes_and_small_tiles(shape, op, block, band):
    """Many tiles each way, of rows, columns and depth, in bands that do not divide them."""
    inputs = arrays(op, *shape)
    with pytest.MonkeyPatch.context() as patch:
        tile = GroupedTile(block, 16, 16, 4, 1, band)
        patch.setattr(tiles, "grouped_matmul", lambda *_: tile)
        check(run("triton", op, *inputs), op, *inputs, 2**-18)


@settings(max_examples=6, deadline=None)
@given(shapes(), st.integers(1, 3))
def test_xla_on_drawn_shapes_and_small_blocks(shape, factor):
    inputs = arrays("grouped_matmul", *shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_matmul_xla, "SMALLER", (8,))
        patch.setattr(grouped_matmul_xla, "BLOCK", 8 * factor)
        got = value_and_gradients(grouped_matmul_xla.grouped_matmul, *inputs)
    check(got, "grouped_matmul", *inputs, 2**-18)


@pytest.mark.parametrize("implementation", TARGETS)
def test_what_stands_behind_the_groups_is_not_read(implementation):
    """Nor do the rows of one expert reach another's: not-a-numbers stay where they are."""
    dtype = "bfloat16" if implementation == "tokamax" else "float32"
    (x, w), sizes, dy = arrays("grouped_matmul", (20, 5, 0, 12), 50, 24, 40, dtype)

    def product(x, dy):
        return run(implementation, "grouped_matmul", (x, w), sizes, dy)

    clean, one = product(x, dy), product(x.at[22].set(jnp.nan), dy)
    dirty = product(x.at[37:].set(jnp.nan), dy.at[37:].set(jnp.nan))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(one[0][22]).all() and not np.isnan(np.delete(one[0], 22, 0)).any()
    assert [bool(np.isnan(dw).any()) for dw in one[2]] == [False, True, False, False]


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_weights_gradient_is_not_rounded_to_the_dtype_of_x(implementation):
    operands, sizes, dy = arrays("grouped_matmul", (30, 34), 64, 32, 32, "bfloat16", "float32")
    dw = run(implementation, "grouped_matmul", operands, sizes, dy)[2]
    x, dy = np.asarray(operands[0], np.float64), np.asarray(dy, np.float64)
    want = np.stack([x[:30].T @ dy[:30], x[30:].T @ dy[30:]])
    assert np.max(np.abs(dw - want)) < 2**-20 * np.max(np.abs(want))


def test_empty_experts_and_rows_behind_cost_no_products():
    sizes = (0, 130, 0, 0, 3, 0, 0, 0)
    operands, group_sizes, _ = arrays("grouped_matmul", sizes, 400, 64, 32)
    tile = tiles.grouped_matmul("forward", None, None, "float32", 400, 64, 32)
    with launch.interpreted():
        _, products = interpreter.count_products(triton.grouped_matmul, *operands, group_sizes)
    rows = schedule.blocks_visited(list(sizes), 400, tile.block_m)
    assert rows == 6 and products == {
        "rows_kernel": rows * (64 // tile.block_k) * (32 // tile.block_n)
    }


def test_low_rank_products_take_tiles_of_the_rank():
    for gpu in (80, 86, 90, 100):
        narrow = tiles.grouped_matmul("forward", None, gpu, "bfloat16", 131072, 2048, 16)
        shallow = tiles.grouped_matmul("forward", None, gpu, "bfloat16", 131072, 16, 768)
        assert narrow.block_n == 16 and narrow.block_k >= 64
        assert shallow.block_k == 16 and shallow.block_n >= 128
        assert tiles.grouped_matmul("dw", None, gpu, "bfloat16", 131072, 2048, 16).block_n == 16
        assert tiles.grouped_matmul("dw", None, gpu, "bfloat16", 131072, 16, 768).block_k == 16


def test_tuned_tiles_are_by_class_of_width_and_depth(monkeypatch):
    key = tiles.grouped_matmul_key("forward", "H200", jnp.bfloat16, 2048, 768)
    assert key == tiles.grouped_matmul_key("forward", "H200", jnp.bfloat16, 4096, 1408)
    assert key != tiles.grouped_matmul_key("forward", "H200", jnp.bfloat16, 2048, 16)
    tuned = {"block_m": 64, "block_n": 128, "block_k": 32, "num_warps": 4, "num_stages": 5}
    monkeypatch.setattr(tiles, "tuned_tiles", lambda: {key: tuned | {"band": 4}})
    got = tiles.grouped_matmul("forward", "H200", 90, jnp.bfloat16, 131072, 2048, 768)
    assert got == GroupedTile(64, 128, 32, 4, 5, 4)
    assert tiles.grouped_matmul("dx", "H200", 90, jnp.bfloat16, 131072, 2048, 768) != got


@settings(max_examples=30, deadline=None)
@given(shapes(M=500, E=6), st.sampled_from((16, 128)))
def test_schedule_covers_each_row_once_and_in_order(shape, block_m):
    sizes, M = shape[:2]
    group, first, end = np.asarray(schedule.schedule(jnp.array(sizes), M, block_m))
    assert len(group) == schedule.num_tiles(M, len(sizes), block_m)
    live = first < end
    assert not live[np.argmin(live) :].any() or live.all()  # idle tiles come last
    rows = np.concatenate([np.arange(a, b) for a, b in zip(first[live], end[live], strict=True)])
    np.testing.assert_array_equal(rows, np.arange(M))
    owner = np.repeat(np.arange(len(sizes) + 1), [*sizes, M - sum(sizes)])
    for g, a, b in zip(group[live], first[live], end[live], strict=True):
        assert b - a <= block_m and (owner[a:b] == g).all()
    assert np.sum(live & (group < len(sizes))) == schedule.blocks_visited(sizes, M, block_m)


def test_group_sizes_that_sum_to_more_than_the_rows_are_cut_off():
    group, first, end = np.asarray(schedule.schedule(jnp.array([20, 100, 7]), 64, 16))
    live = first < end
    assert end.max() == 64 and set(group[live]) == {0, 1}
    assert list(schedule.offsets(jnp.array([20, 100, 7]), 64)) == [0, 20, 64, 64]


def test_rematerialised_swiglu_keeps_the_products_in_the_backward_pass_only():
    (x, w_gate, w_up), sizes, _ = arrays("grouped_swiglu", (20, 10), 40, 32, 16)

    @jax.checkpoint
    def layer(x):
        return jnp.sum(triton.grouped_swiglu(x, w_gate, w_up, sizes))

    with launch.interpreted():
        forward = str(jax.make_jaxpr(lambda x: jax.vjp(layer, x)[0])(x))
        both = str(jax.make_jaxpr(jax.grad(layer))(x))
    callback = "= pure_callback"
    products = [line for line in both.splitlines() if callback in line]
    assert forward.count(callback) == 1 and len(products) == 5  # h; h, gate, up; dx; dw twice
    assert sum(line.count("f32[40,16]") for line in products) == 4


def test_costs():
    M, E, D, F = 131072, 128, 2048, 768
    assert cost.flops(M, [(D, F)]) == 2 * M * D * F
    assert cost.rows_bytes(M, E, [D], F, 2) == 2 * (M * D + M * F + E * D * F)
    assert cost.weights_bytes(M, E, D, F, 2, 4) == 2 * M * (D + F) + 4 * E * D * F
    apart = 2 * cost.rows_bytes(M, E, [D], F, 2) + 3 * 2 * M * F
    fused, kept = (cost.swiglu_bytes(M, E, D, F, 2, residuals=r) for r in (False, True))
    assert apart - fused == 2 * M * (D + 4 * F) and apart - kept == 2 * M * (D + 2 * F)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((4, 8, 1))}, "want \\[M, K\\]"),
        ({"x": jnp.zeros((4, 8), jnp.int32)}, "want one of bfloat16"),
        ({"w": jnp.zeros((2, 9, 16))}, "with E 2, K 8"),
        ({"w": jnp.zeros((2, 8, 16), jnp.int8)}, "want a floating dtype"),
        ({"group_sizes": jnp.zeros(2)}, "want integers"),
        ({"group_sizes": jnp.zeros(3, int)}, "with E 3, K 8"),
    ],
)
def test_refuses_what_it_cannot_take(change, message):
    good = {"x": jnp.zeros((4, 8)), "w": jnp.zeros((2, 8, 16)), "group_sizes": jnp.array([1, 2])}
    with pytest.raises(ValueError, match=message):
        triton.grouped_matmul(**(good | change))
    if "want one of bfloat16" not in message:  # what fits none is refused by all
        with pytest.raises(ValueError, match=message):
            reference.grouped_matmul(**(good | change))
        for name in GROUPED_MATMUL.names:
            with pytest.raises(ValueError, match=message):
                grouped_matmul(**(good | change), implementation=name)


def test_refuses_weights_that_differ():
    good = {"x": jnp.zeros((4, 8)), "w": jnp.zeros((2, 8, 16)), "group_sizes": jnp.array([1, 2])}
    with pytest.raises(ValueError, match="differ"):
        triton.grouped_swiglu(good["x"], good["w"], jnp.zeros((2, 8, 17)), good["group_sizes"])
    with pytest.raises(ValueError, match="b \\(2, 4, 15\\): want \\(2, 4, 16\\)"):
        triton.grouped_lora_matmul(
            good["x"], good["w"], jnp.zeros((2, 8, 4)), jnp.zeros((2, 4, 15)), good["group_sizes"]
        )


LARGE = {
    "bfloat16": ((300, 0, 1, 1700, 512, 1000, 130, 64), 4000, 512, 768, "bfloat16", "float32"),
    "no_tile_multiples": ((900, 33, 0, 1000), 2000, 520, 1408, "bfloat16", "bfloat16"),
    "rank_16": ((700, 5, 0, 1300), 2048, 1024, 16, "bfloat16", "float32"),
    "of_rank_16": ((700, 5, 0, 1300), 2048, 16, 1024, "float16", "float32"),
}


@pytest.mark.gpu
@pytest.mark.validates("grouped_matmul triton")
@pytest.mark.parametrize(
    ("op", "case"),
    [("grouped_matmul", c) for c in (*CASES, *LARGE)]
    + [(op, c) for op in OPS[1:] for c in ("uneven", "one_giant", "bfloat16", "no_tile_multiples")],
)
def test_triton_on_gpu(op, case):
    *shape, dtype, w_dtype = (CASES | LARGE)[case]
    operands, sizes, dy = arrays(op, *shape, dtype, w_dtype)
    function = jax.jit(lambda *a: value_and_gradients(getattr(triton, op), a[:-2], *a[-2:]))
    got = function(*operands, sizes, dy)
    # Sums of up to 2,000 products meet in another order than the reference's.
    roundings = (1 if op == "grouped_matmul" else 4) * (8 if dtype == "float32" else 1)
    check(got, op, operands, sizes, dy, ROUNDING[dtype] * roundings)


@pytest.mark.gpu
@pytest.mark.validates("grouped_matmul tokamax")
@pytest.mark.parametrize("case", ["one_giant", "bfloat16", "no_tile_multiples"])
def test_tokamax_on_gpu(case):
    *shape, dtype, _ = (CASES | LARGE)[case]
    operands, sizes, dy = arrays("grouped_matmul", *shape, dtype, dtype)
    x, w = operands
    here, features = Target.here(), {"dtype": x.dtype, "features": (w.shape[1], w.shape[2])}
    said = next(i.why_not for i in GROUPED_MATMUL.implementations if i.name == "tokamax")(
        here, **features
    )
    if case == "no_tile_multiples" and ragged_dot_implementation(here.capability) == "mosaic":
        assert said is not None
        assert "takes features in steps of" in said  # as its Mosaic kernels' tiles are wide
        return
    if said:
        skip(f"tokamax {said}")
    _, fn = GROUPED_MATMUL.resolve("tokamax", here, **features)
    got = jax.jit(lambda *a: value_and_gradients(fn, a[:-2], *a[-2:]))(*operands, sizes, dy)
    check(got, "grouped_matmul", operands, sizes, dy, ROUNDING[dtype])


@pytest.mark.gpu
@pytest.mark.validates("grouped_matmul triton")
@pytest.mark.parametrize("op", OPS)
def test_triton_repeats_bit_for_bit_on_gpu(op):
    *shape, dtype, w_dtype = LARGE["bfloat16"]
    operands, sizes, dy = arrays(op, *shape, dtype, w_dtype)
    function = jax.jit(lambda *a: value_and_gradients(getattr(triton, op), a[:-2], *a[-2:]))
    first, *others = (function(*operands, sizes, dy) for _ in range(3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def resolve(name, target=H100, dtype="bfloat16", features=(2048, 768)):
    return GROUPED_MATMUL.resolve(name, target, dtype=jnp.dtype(dtype), features=features)[0]


def test_the_implementation_is_chosen_by_gpu_dtype_and_shape(monkeypatch):
    monkeypatch.setattr("jaxrl.ops.registry.is_validated", lambda kernel, gpu: False)
    assert resolve("auto") == "tokamax"
    assert resolve("auto", CPU) == "xla"
    with pytest.raises(ValueError, match="not float32\\); use 'triton', whose tests have not run"):
        resolve("auto", dtype="float32")
    assert resolve("triton", dtype="float32") == "triton"
    monkeypatch.setattr("jaxrl.ops.registry.is_validated", lambda kernel, gpu: True)
    assert resolve("auto") == "triton"
    with pytest.raises(ValueError, match=r"'triton' needs an NVIDIA GPU, .* for cpu; use 'xla'"):
        resolve("triton", CPU)
    with pytest.raises(ValueError, match="'tokamax' takes features in steps of 64, not 2048 x 16"):
        resolve("tokamax", features=(2048, 16))


def test_the_op_runs_what_it_resolves_to():
    operands, sizes, _ = arrays("grouped_matmul", *CASES["uneven"][:4])
    a, b = (
        grouped_matmul(*operands, sizes, implementation=i, target=CPU) for i in ("xla", "reference")
    )
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
