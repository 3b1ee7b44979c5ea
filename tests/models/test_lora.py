"""Adapters: where they go, what they are called, and what they compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINY

from jaxrl.models.lora import TARGETS, LoraConfig, add_lora
from jaxrl.models.params import nest, specs
from jaxrl.models.transformer import Transformer
from jaxrl.perf.flops import lora_params

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
MODEL = dataclasses.replace(TINY, num_layers=2)


def abstract(**lora):
    return add_lora(Transformer(MODEL), LoraConfig(**lora)) if lora else Transformer(MODEL)


def filled(model, *, b: float = 0.0):
    """The model with random parameters, the same for the same path; `b`: scale of LoRA's B."""

    def value(path, spec):
        rng = np.random.default_rng(list(".".join(path).encode()))
        scale = b if path[-1] == "lora_b" else 0.1
        return jnp.asarray(scale * rng.standard_normal(spec.shape), jnp.float32)

    values = {p: value(p, s) for p, s in specs(model).items()}
    return nnx.merge(nnx.graphdef(model), nest(values)), values


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, 6)))
    return apply(*nnx.split(model), tokens)


@pytest.mark.parametrize("targets", [TARGETS, ("q",), ("v", "down"), MLP])
def test_only_the_targets_get_adapters(targets):
    model = abstract(rank=4, targets=targets)
    expected = {
        ("layers", "attention" if t in ATTENTION else "mlp", t, ab)
        for t in targets
        for ab in ("lora_a", "lora_b")
    }
    assert specs(model, nnx.LoRAParam).keys() == expected
    assert specs(model, nnx.Param).keys() == specs(abstract()).keys()
    assert all(s.hf is None for s in specs(model, nnx.LoRAParam).values())


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("targets", [TARGETS, ("k", "o"), MLP])
def test_parameter_count_is_the_closed_form(rank, targets):
    adapters = specs(abstract(rank=rank, targets=targets), nnx.LoRAParam)
    assert sum(s.size for s in adapters.values()) == lora_params(MODEL, rank, targets)


def test_shapes_and_initialisers():
    adapters = specs(abstract(rank=4), nnx.LoRAParam)
    a, b = (adapters["layers", "mlp", "down", f"lora_{x}"] for x in "ab")
    assert (a.shape, b.shape) == ((2, 96, 4), (2, 4, 64))
    assert (a.init, b.init) == ("kaiming_uniform", "zeros")
    assert adapters["layers", "attention", "k", "lora_b"].shape == (2, 4, 2 * 16)


def test_b_of_zero_leaves_the_output_alone():
    with_lora, plain = logits(filled(abstract(rank=4))[0]), logits(filled(abstract())[0])
    np.testing.assert_array_equal(with_lora, plain)
    assert np.max(np.abs(logits(filled(abstract(rank=4), b=0.1)[0]) - plain)) > 1e-3


@pytest.mark.parametrize("lora", [{"rank": 4}, {"rank": 2, "alpha": 6.0, "targets": ("v", "up")}])
def test_adapters_equal_their_sum_with_the_weight(lora):
    """y = x (W + alpha / R A B)."""
    model, values = filled(abstract(**lora), b=0.1)
    merged = dict(values)
    for path in [p for p in values if p[-1] == "lora_a"]:
        kernel, b = (*path[:-1], "kernel"), merged.pop((*path[:-1], "lora_b"))
        scale = lora.get("alpha", 32.0) / lora["rank"]
        merged[kernel] = merged[kernel] + scale * merged.pop(path) @ b
    plain = nnx.merge(nnx.graphdef(abstract()), nest(merged))
    expected = logits(plain)
    np.testing.assert_allclose(logits(model), expected, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_raises(rank):
    with pytest.raises(ValueError, match=f"lora rank {rank} must be at least 1"):
        LoraConfig(rank=rank)


@pytest.mark.parametrize("targets", [("q", "query"), ()])
def test_unknown_or_no_targets_raise(targets):
    with pytest.raises(ValueError, match=r"lora targets \[.*\]: each must be one of q, k, v, o"):
        LoraConfig(targets=targets)
