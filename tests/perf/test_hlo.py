"""FLOPs, calls, collectives and arrays read from compiled programs whose truth is known."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from jaxrl.perf.hlo import CallSite, Collective, HloArray, summarize

T, D = 64, 128
X, W = jax.ShapeDtypeStruct((T, D), jnp.float32), jax.ShapeDtypeStruct((D, D), jnp.float32)
PRODUCT = 2 * T * D * D  # x @ w


def stacked(*sizes):
    return jax.ShapeDtypeStruct((*sizes, D, D), jnp.float32)


def compiled_summary(fn, *args):
    return summarize(jax.jit(fn).lower(*args).compile().as_text())


def test_one_product():
    summary = compiled_summary(lambda x, w: x @ w, X, W)
    assert summary.flops == PRODUCT
    assert not summary.custom_calls and not summary.collectives and not summary.unknown_loops


def test_batched_products():
    def fn(q, k, v):
        return jnp.einsum("BTS,BSH->BTH", jnp.einsum("BTH,BSH->BTS", q, k), v)

    shape = jax.ShapeDtypeStruct((3, T, D), jnp.float32)
    assert compiled_summary(fn, shape, shape, shape).flops == 2 * (3 * 2 * T * T * D)


def test_nested_scans_multiply():
    def fn(x, ws):
        def outer(x, ws):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] @ ws[0], None

        return jax.lax.scan(outer, x, ws)[0]

    assert compiled_summary(fn, X, stacked(5, 3)).flops == 5 * (3 + 1) * PRODUCT


def test_gradient_of_a_scan():
    def loss(ws, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    # Forward, and backward two per layer.
    assert compiled_summary(jax.grad(loss), stacked(7), X).flops == 3 * 7 * PRODUCT


def test_rematerialised_products_count_again():
    def loss(ws, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    assert compiled_summary(jax.grad(loss), stacked(7), X).flops == 4 * 7 * PRODUCT


def test_scan_in_a_static_fori_loop():
    def fn(x, ws):
        def scan(_, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

        return jax.lax.fori_loop(2, 6, scan, x)

    assert compiled_summary(fn, X, stacked(3)).flops == 4 * 3 * PRODUCT


def test_unknown_loops_are_kept_apart():
    def fn(x, ws, n):
        def steps(x, w):
            with jax.named_scope("decode"):
                x = jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w @ w), x)
            return x @ w, None

        return jax.lax.scan(steps, x, ws)[0]

    n = jax.ShapeDtypeStruct((), jnp.int32)
    summary = compiled_summary(fn, X, stacked(3), n)
    assert summary.flops == 3 * PRODUCT
    (loop,) = summary.unknown_loops
    assert "decode" in loop.op_name
    assert loop.runs == 3
    assert loop.iteration.flops == 2 * PRODUCT
    assert not loop.iteration.unknown_loops


def test_a_conditional_costs_its_dearest_branch():
    def fn(i, x, w):
        return jax.lax.switch(i, [lambda: x, lambda: x @ w @ w, lambda: x @ w])

    i = jax.ShapeDtypeStruct((), jnp.int32)
    assert compiled_summary(fn, i, X, W).flops == 2 * PRODUCT
    assert compiled_summary(
        lambda p, x, w: jax.lax.cond(p, lambda: x @ w, lambda: x), i, X, W
    ).flops


def test_a_function_called_twice_counts_twice():
    @jax.jit
    def twice(x, w):
        return jnp.tanh(x @ w)

    assert compiled_summary(lambda x, w: twice(twice(x, w), w), X, W).flops == 2 * PRODUCT


def test_logits_show_among_the_largest_arrays():
    def fn(x, w):
        return jnp.sum(jnp.exp(x @ w))

    V = 5000
    w = jax.ShapeDtypeStruct((D, V), jnp.float32)
    arrays = compiled_summary(fn, X, w).largest_arrays
    assert arrays[0].dims == (D, V) and arrays[0].bytes == D * V * 4
    assert arrays[1].dims == (T, V) and "dot_general" in arrays[1].op_name
    assert all(a.bytes >= b.bytes for a, b in itertools.pairwise(arrays))


def test_not_hlo():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        summarize("module @jit_f {}")


# One of each thing that the compilers here do not write, or not on CPU.
TEXT = """HloModule hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p.2: bf16[8,4]) -> bf16[] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  %outer = bf16[8,4,8,4]{3,2,1,0} broadcast(%p.2), dimensions={0,1}
  ROOT %total = bf16[] reduce(%outer), dimensions={0,1,2,3}, to_apply=%add
}

%wrapped (p: bf16[8,4]) -> bf16[1,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %rs = bf16[1,4]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (t: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %t = (s32[], bf16[2,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[2,4]{1,0:T(8,128)S(5)} get-tuple-element(%t), index=1
  %ags = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[16,4]{1,0} all-gather-done(%ags)
  %late = (bf16[2,4]{1,0}, bf16[2,4]{1,0}) collective-permute-start(%x), backend_config={"is_sync":true}
  %late-done = bf16[2,4]{1,0} collective-permute-done(%late)
  %triton = bf16[2,4]{1,0} custom-call(%x), custom_call_target="triton_kernel_call_ffi", metadata={op_name="ours"}, backend_config={cost_estimate_json = "{\\22flops\\22: 700, \\22bytes_accessed\\22: 9}", opaque = "x\\9C"}
  %fmha = (bf16[2,4]{1,0}, u8[0]{0}) custom-call(%agd, /*index=1*/%x), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="attend"}
  %gemm = (bf16[16,6]{1,0}, s8[64]{0}) custom-call(%agd, %fmha.w), custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %fmha.w = bf16[6,4]{1,0} constant({...})
  ROOT %out = (s32[], bf16[2,4]{1,0}) tuple(%i, %x)
}

%cond (t.1: (s32[], bf16[2,4])) -> pred[] {
  %t.1 = (s32[], bf16[2,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%product (p.3: bf16[8,4]) -> bf16[8,8] {
  %p.3 = bf16[8,4]{1,0} parameter(0)
  ROOT %dot = bf16[8,8]{1,0} dot(%p.3, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%none (p.4: bf16[8,4]) -> bf16[8,8] {
  %p.4 = bf16[8,4]{1,0} parameter(0)
  ROOT %blank = bf16[8,8]{1,0} broadcast(%p.4), dimensions={}
}

ENTRY %main (p.1: bf16[2,4], q: bf16[8,4]) -> bf16[1,4] {
  %p.1 = bf16[2,4]{1,0} parameter(0)
  %q = bf16[8,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[2,4]{1,0}) tuple(%zero, %p.1)
  %loop = (s32[], bf16[2,4]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %never-in-memory = bf16[] fusion(%q), kind=kLoop, calls=%fused
  %called = bf16[8,8]{1,0} call(%q), to_apply=%product
  %yes.1 = pred[] constant(true)
  %either = bf16[8,8]{1,0} conditional(%yes.1, %q, %q), true_computation=%none, false_computation=%product
  %conv = bf16[8,4]{1,0} convolution(%q, %q), dim_labels=bf_io->bf
  %start = ((bf16[8,4]{1,0}), bf16[1,4]{1,0}) async-start(%q), calls=%wrapped
  ROOT %done = bf16[1,4]{1,0} async-done(%start)
}
"""  # noqa: E501


def test_calls_and_collectives():
    summary = summarize(TEXT)
    assert summary.flops == 5 * 2 * 16 * 4 * 6 + 2 * (2 * 8 * 4 * 8)  # loop, call and conditional
    targets = ("__cudnn$fmhaSoftmax", "__cublas$lt$matmul$f8", "triton_kernel_call_ffi")
    assert summary.custom_calls == dict.fromkeys(targets, 5)
    shapes = (("bf16", (16, 4)), ("bf16", (2, 4)))
    assert CallSite("__cudnn$fmhaSoftmax", "attend", shapes, None, 5) in summary.call_sites
    declared = CallSite("triton_kernel_call_ffi", "ours", (("bf16", (2, 4)),), 700, 5)
    assert declared in summary.call_sites
    assert set(summary.collectives) == {
        Collective("all-gather", 16 * 4 * 2, 5, True),
        Collective("collective-permute", 2 * 4 * 2, 5, False),
        Collective("reduce-scatter", 8 * 4 * 2, 1, True),
    }
    assert summary.uncounted == {"convolution": 1}
    assert summary.largest_arrays[0] == HloArray("bf16", (16, 6), 192, "")
    assert len(summarize(TEXT, largest=2).largest_arrays) == 2


@pytest.mark.parametrize("missing", ["known_trip_count", "rhs_contracting_dimensions"])
def test_no_number_is_made_up(missing):
    text = TEXT.replace(missing, "renamed")
    if missing == "known_trip_count":
        (loop,) = summarize(text).unknown_loops
        assert loop.iteration.custom_calls["__cudnn$fmhaSoftmax"] == 1
        assert summarize(text).flops == 2 * (2 * 8 * 4 * 8)
    else:
        with pytest.raises(ValueError, match="no dimension numbers on the matrix product gemm"):
            summarize(text)


GPU_STEP = """
import json
from jaxrl.perf import compile_only
from jaxrl.perf.hlo import summarize

compile_only.prepare_environment()
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

T, D, N, H, L = 256, 256, 4, 64, 3
mesh = Mesh(np.array(compile_only.topology("H100", 8)), ("fsdp",), axis_types=(AxisType.Auto,))

def spec(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))

def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

def loss(ws, x):
    def layer(x, w):
        q = (x @ w).reshape(x.shape[0], T, N, H)
        return x + attend(q, q, q).reshape(x.shape), None
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, ws)[0].astype(jnp.float32))

with compile_only.as_device(mesh), compile_only.cudnn_assumed():
    lowered = jax.jit(jax.grad(loss)).lower(spec((L, D, D), None, "fsdp"), spec((8, T, D), "fsdp"))
s = summarize(compile_only.compile_for(lowered).as_text())
gathered = [[c.bytes, c.calls] for c in s.collectives if c.kind == "all-gather"]
print(json.dumps([s.flops, s.custom_calls, gathered, len(s.unknown_loops),
                  [c.operands[0] for c in s.call_sites if "fmha" in c.target]]))
"""


def test_a_step_compiled_for_gpus():
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", GPU_STEP], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    flops, calls, gathered, unknown, operands = json.loads(done.stdout.splitlines()[-1])
    T, D, L = 256, 256, 3
    # Per device: forward, recomputed forward, two products backward.
    assert flops == 4 * L * 2 * T * D * D
    assert Counter(calls) == {
        "__cublas$lt$matmul": 4 * L,
        "__cudnn$fmhaSoftmax": 2 * L,
        "__cudnn$fmhaSoftmaxBackward": L,
    }
    assert gathered == [[2 * D * D, 2 * L]]  # each layer's weights, forward and backward
    assert unknown == 0
    assert operands == [["bf16", [1, T, 4, 64]]] * 3
