"""What each activation-checkpointing policy keeps of a block, where, and what it runs again."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxprs import primitives
from tiny import TINY

from jaxrl.models.attention import LayerContext
from jaxrl.models.layers import rope_tables
from jaxrl.models.transformer import Transformer
from jaxrl.ops.attention import resolve_attention
from jaxrl.ops.registry import Target
from jaxrl.perf.compile_only import cudnn_assumed
from jaxrl.train.backprop import LayerStack
from jaxrl.train.remat import remat_policy

B, T = 2, 768  # several blocks of attention
L, D, N, H = TINY.num_layers, TINY.hidden_size, TINY.num_heads, TINY.head_dim
LAYER_INPUT = (L, B, T, D)


@functools.cache
def traced(ac: str, attention: str = "xla"):
    """(types of what is kept for backward, primitives that run in all) of TINY's layers."""
    graphdef, state = nnx.split(Transformer(TINY).layers)
    gpu = attention == "cudnn"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    target = Target("gpu", "NVIDIA H100 80GB HBM3", 90) if gpu else Target("cpu")
    case = {"dtype": dtype, "head_dim": H, "packed": False, "seq_len": T}
    attend = resolve_attention(attention, target=target, **case)

    def layer(trainable, constants, x):
        _, tables = constants
        return nnx.merge(graphdef, trainable)(x, LayerContext(*tables, None, attend.fn))

    stack = LayerStack(layer, ac=ac, fetch=lambda tr, fr: (tr, fr), reduce=lambda g: g)
    kept = []

    def run(params, x):
        tables = rope_tables(TINY, jnp.zeros((B, T), jnp.int32))
        y, saved, _ = stack.forward(params, {}, tables, x)
        kept.extend(jax.typeof(a) for a in jax.tree.leaves(saved))
        return stack.backward(params, {}, tables, saved, y, params)

    with cudnn_assumed():
        x = jax.ShapeDtypeStruct(LAYER_INPUT[1:], dtype)
        jaxpr = jax.make_jaxpr(run)(nnx.to_pure_dict(state), x)
    return kept, primitives(jaxpr.jaxpr)


def test_recompute_keeps_the_layer_input_only():
    (kept,), _ = traced("recompute")
    assert kept.shape == LAYER_INPUT and kept.memory_space == jax.memory.Space.Device


def test_offload_keeps_the_layer_input_in_host_memory():
    (kept,), _ = traced("offload")
    assert kept.shape == LAYER_INPUT and kept.memory_space == jax.memory.Space.Host


def test_selective_keeps_attention_and_the_mlp_input_too():
    shapes = [a.shape for a in traced("selective")[0]]
    assert shapes.count(LAYER_INPUT) == 2
    attention = [s for s in shapes if s != LAYER_INPUT]
    assert attention and (L, B * T, TINY.intermediate_size) not in shapes
    elements = L * B * T * N * H
    assert max(functools.reduce(int.__mul__, s) for s in attention) == elements


def test_none_keeps_what_the_mlp_computes():
    shapes = [a.shape for a in traced("none")[0]]
    assert shapes.count((L, B * T, TINY.intermediate_size)) >= 3


@pytest.mark.parametrize("ac", ["none", "recompute", "offload"])
def test_how_often_the_block_runs(ac):
    """A matrix product of forward appears once more in backward where it is recomputed."""
    products = {name: traced(name)[1]["dot_general"] for name in ("none", ac)}
    again = 0 if ac == "none" else 8  # q, k, v, attention's two, o, gate, up
    assert products[ac] == products["none"] + again


@pytest.mark.parametrize(
    ("ac", "forwards"),
    [
        ("none", 1),
        ("recompute", 2),
        ("selective", 1),
    ],
)
@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_how_often_attention_runs_forward(ac, forwards, attention):
    count = traced(ac, attention)[1]
    if attention == "xla":  # two exponentials per block in forward, one in backward
        runs = (count["exp"] - 1) / 2
    else:
        runs = count["dot_product_attention_fwd_wrapper"]
    assert runs == forwards


def test_unknown_policy_raises():
    with pytest.raises(ValueError, match="unknown activation checkpointing 'full'; one of none"):
        remat_policy("full")
