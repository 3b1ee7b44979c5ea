"""The contract of jaxrl.perf.compile_only: what of JAX and XLA the planner relies on.

The compilers run in one subprocess (this file as a script), which prints what it saw as JSON: a
kernel that XLA cannot take aborts the process, and the tests' own JAX may run on another platform.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from jaxrl.perf import compile_only
from jaxrl.perf.compile_only import Memory

L, T, D = 3, 256, 128  # the offload case: layers, tokens, width
GPUS = ("H100", "B200", "A6000")
HEAD_DIMS = (64, 128)


@pytest.fixture(scope="module")
def seen():
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr and "CUB" not in done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_h100(seen):
    case = seen["H100 x1"]
    assert case["device"] == ["gpu", "NVIDIA H100 80GB HBM3"]
    arguments = 2 * (1024 * 2048 + 2048 * 1024 + 512 * 1024)  # w_in, w_out, x in bf16
    assert case["memory"]["argument"] == arguments
    assert case["memory"]["alias"] == 2 * 2 * 1024 * 2048  # both weights donated
    assert case["peak"] >= arguments
    assert "all-gather" not in case["text"] and "all-reduce" not in case["text"]
    assert "__cublas$lt$matmul" in case["text"] and "__triton_gemm" not in case["text"]


def test_eight_h100_share_the_weights(seen):
    case = seen["H100 x8"]
    assert case["memory"]["argument"] == 2 * (2 * 1024 * 2048 // 8 + 512 * 1024)
    assert "all-gather" in case["text"]
    assert "reduce-scatter" in case["text"] or "all-reduce" in case["text"]


def test_offload_moves_exactly_the_layer_inputs_to_pinned_host_memory(seen):
    kept, offloaded = seen["recompute"]["memory"], seen["offload"]["memory"]
    assert kept["host_temp"] == 0
    assert offloaded["host_temp"] == L * T * D * 4
    assert offloaded["temp"] < kept["temp"]


def test_an_argument_lives_in_host_memory_if_its_sharding_says_so(seen):
    case = seen["host argument"]
    whole = L * T * D * 4 // 8
    memory = case["memory"]
    assert memory["host_argument"] == memory["host_output"] == memory["host_alias"] == whole
    assert memory["argument"] == whole  # the other one
    assert memory["temp"] < whole and memory["host_temp"] == 0
    assert case["host"] == whole and "S(5)}, f32[" in case["text"].splitlines()[0]
    # Once this fails, jaxrl.train.offload.on_host needs no abstract mesh.
    assert seen["kind over compile-only devices"] is None


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cudnn_attention_compiles_forward_and_backward(seen, gpu, head_dim):
    text = seen[f"cudnn {gpu} {head_dim}"]["text"]
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1


@pytest.mark.parametrize("gpu, arch", [("A6000", "sm_86"), ("H100", "sm_90"), ("B200", "sm_100")])
def test_a_pallas_kernel_is_lowered_for_the_target(seen, gpu, arch):
    case = seen[f"pallas {gpu}"]
    assert "__gpu$xla.gpu.triton" in case["text"]
    assert case["arch"].startswith(arch)


def test_a_sort_compiles(seen):
    assert "sort" in seen["sort"]["text"]


def test_hosts_split_the_devices(seen):
    assert seen["hosts"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_unknown_compiler_option_is_refused(seen):
    assert "xla_gpu_no_such_flag" in seen["unknown option"]


def test_as_device_leaves_nothing_behind(seen):
    assert seen["default device"] == ["cpu", "cpu", "cpu"]


def test_peak_counts_donated_memory_once():
    m = Memory(argument=10, output=7, alias=5, temp=100, host_temp=3)
    assert m.peak == 112 and m.peak_gib == 112 / 2**30 and m.host_gib == 3 / 2**30
    m = dataclasses.replace(m, host_argument=20, host_output=22, host_alias=20)
    assert m.peak == 112 and m.host_gib == 25 / 2**30


def test_missing_packages_are_one_clear_line(monkeypatch):
    monkeypatch.setattr(compile_only, "PACKAGES", ("jax", "no-such-package"))
    with pytest.raises(ModuleNotFoundError) as error:
        compile_only.prepare_environment()
    assert str(error.value) == (
        "planning for a GPU needs no-such-package (Linux x86-64): pip install 'jaxrl[plan]'"
    )


@pytest.mark.parametrize("count, hosts", [(0, 1), (8, 3), (8, 0)])
def test_impossible_topology(count, hosts):
    with pytest.raises(ValueError, match=f"{count} GPUs do not spread evenly over {hosts} hosts"):
        compile_only.topology("H100", count, hosts)


def test_unknown_gpu():
    with pytest.raises(ValueError, match="unknown GPU 'H10O'; did you mean H100"):
        compile_only.topology("H10O", 1)


def main():
    compile_only.prepare_environment()

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.ad_checkpoint import checkpoint_name
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as pltriton
    from jax.extend import backend
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxrl.train.offload import on_host

    def compile_on(gpu, num_gpus, fn, *args, donate=(), host=None):
        """`args`: (shape, dtype, partition spec). host: which one is in host memory, and returned
        there."""
        devices = compile_only.topology(gpu, num_gpus)
        mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
        args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p)) for s, d, p in args]
        out = None
        if host is not None:
            dropped = args[host].sharding.with_memory_kind("pinned_host")
            seen["kind over compile-only devices"] = dropped.memory_kind
            out = on_host(args[host].sharding)
            args[host] = args[host].update(sharding=out)
        with compile_only.as_device(mesh), compile_only.cudnn_assumed():
            asked = backend.get_default_device().device_kind
            lowered = jax.jit(fn, donate_argnums=donate, out_shardings=out).lower(*args)
        compiled = compile_only.compile_for(lowered)
        m = compile_only.memory(compiled)
        return {
            "device": [devices[0].platform, asked],
            "arch": "sm_" + devices[0].compute_capability.replace(".", ""),
            "memory": dataclasses.asdict(m),
            "peak": m.peak,
            "host": m.host,
            "text": compiled.as_text(),
        }

    def mlp_step(w_in, w_out, x):
        def loss(w_in, w_out):
            return jnp.sum((jax.nn.silu(x @ w_in) @ w_out).astype(jnp.float32) ** 2)

        g_in, g_out = jax.grad(loss, argnums=(0, 1))(w_in, w_out)
        return w_in - g_in, w_out - g_out

    def scanned(policy):
        def loss(ws, x):
            def body(x, w):
                return jnp.tanh(checkpoint_name(x, "layer_input") @ w), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(body, policy=policy), x, ws)[0])

        return jax.grad(loss)

    def stream(moments, gradients):
        """Moments averaged in place, one layer on the device at a time."""

        def body(i, moments):
            here = jax.lax.dynamic_slice_in_dim(moments, i, 1)
            new = 0.9 * jax.device_put(here, jax.memory.Space.Device) + gradients[i]
            new = jax.device_put(new, jax.memory.Space.Host)
            return jax.lax.dynamic_update_slice_in_dim(moments, new, i, 0)

        return jax.lax.fori_loop(0, L, body, moments)

    def attention_loss(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def add_one(x):
        def kernel(x_ref, o_ref):
            o_ref[...] = x_ref[...] + 1

        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=pltriton.CompilerParams(num_warps=4),
        )(x)

    seen = {}
    weights = (((1024, 2048), jnp.bfloat16, P("fsdp")), ((2048, 1024), jnp.bfloat16, P("fsdp")))
    for n in (1, 8):
        x = ((512 * n, 1024), jnp.bfloat16, P("fsdp"))
        seen[f"H100 x{n}"] = compile_on("H100", n, mlp_step, *weights, x, donate=(0, 1))
    policies = jax.checkpoint_policies
    for name, policy in (
        ("recompute", policies.save_only_these_names("layer_input")),
        (
            "offload",
            policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["layer_input"],
                offload_src="device",
                offload_dst="pinned_host",
            ),
        ),
    ):
        layers = (((L, D, D), jnp.float32, P()), ((T, D), jnp.float32, P()))
        seen[name] = compile_on("H100", 1, scanned(policy), *layers)
    state = ((L, T, D), jnp.float32, P(None, "fsdp"))
    seen["host argument"] = compile_on("H100", 8, stream, state, state, donate=0, host=0)
    for gpu in GPUS:
        seen[f"pallas {gpu}"] = compile_on(gpu, 1, add_one, ((128,), jnp.float32, P()))
        for H in HEAD_DIMS:
            q, kv = ((1, 256, 4, H), jnp.bfloat16, P()), ((1, 256, 2, H), jnp.bfloat16, P())
            grad = jax.grad(attention_loss, argnums=(0, 1, 2))
            seen[f"cudnn {gpu} {H}"] = compile_on(gpu, 1, grad, q, kv, kv)
    seen["sort"] = compile_on("B200", 1, jnp.argsort, ((65536,), jnp.float32, P()))
    seen["hosts"] = [d.process_index for d in compile_only.topology("H100", 8, 2)]
    try:
        compile_only.compile_for(jax.jit(jnp.sin).lower(1.0), xla_gpu_no_such_flag=True)
    except Exception as error:
        seen["unknown option"] = str(error)
    seen["default device"] = [
        backend.get_default_device().platform,
        jax.default_backend(),
        next(iter(jnp.ones(()).devices())).platform,
    ]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
