"""Adapters: where they go, what they are called, and what they compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINY, TINY_GLM, TINY_MOE

from jaxrl.models.lora import TARGETS, LoraConfig, adapted, add_lora, merge_lora
from jaxrl.models.params import nest, specs
from jaxrl.models.transformer import Transformer
from jaxrl.perf.flops import lora_params

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
MODEL = dataclasses.replace(TINY, num_layers=2)


def abstract(config=MODEL, **lora):
    return add_lora(Transformer(config), LoraConfig(**lora)) if lora else Transformer(config)


def filled(model, *, b: float = 0.0):
    """The model with random parameters, the same for the same path; `b`: scale of LoRA's B."""

    def value(path, spec):
        rng = np.random.default_rng(list(".".join(path).encode()))
        # Different tokens choose different experts.
        router = {"kernel": 0.5, "bias": 0.01}.get(path[-1]) if "router" in path else None
        scale = b if path[-1] == "lora_b" else router or 0.1
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


def merge(values, scale: float):
    """The parameters of the base model with W + scale A B for each W that has adapters."""
    merged = dict(values)
    for path in [p for p in values if p[-1] == "lora_a"]:
        kernel, b = (*path[:-1], "kernel"), merged.pop((*path[:-1], "lora_b"))
        merged[kernel] = merged[kernel] + scale * merged.pop(path) @ b
    return merged


SOME = {"rank": 2, "alpha": 6.0, "targets": ("v", "up")}


@pytest.mark.parametrize(
    ("config", "lora"),
    [(MODEL, {"rank": 4}), (MODEL, SOME), (TINY_MOE, SOME), (TINY_GLM, {"rank": 4})],
)
def test_adapters_equal_their_sum_with_the_weight(config, lora):
    """y = x (W + alpha / R A B)."""
    model, values = filled(abstract(config, **lora), b=0.1)
    merged = merge(values, lora.get("alpha", 32.0) / lora["rank"])
    plain = nnx.merge(nnx.graphdef(abstract(config)), nest(merged))
    expected = logits(plain)
    assert np.max(np.abs(logits(filled(abstract(config))[0]) - expected)) > 1e-2
    np.testing.assert_allclose(logits(model), expected, atol=1e-5 * np.max(np.abs(expected)))


def held(model):
    return {tuple(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(
    ("config", "lora"),
    [(MODEL, SOME), (TINY_MOE, SOME), (TINY_GLM, {"rank": 4})],
)
def test_merging_leaves_the_base_model_with_the_sums(config, lora):
    """In place: the adapters are gone, other arrays are the ones that were there."""
    model, values = filled(abstract(config, **lora), b=0.1)
    scales, before = adapted(model), held(model)
    assert merge_lora(model) is model
    assert not adapted(model)
    assert nnx.graphdef(model) == nnx.graphdef(abstract(config))
    after, expected = held(model), merge(values, lora.get("alpha", 32.0) / lora["rank"])
    assert after.keys() == expected.keys()
    for path, value in expected.items():
        if path[:-1] in scales and path[-1] == "kernel":
            assert np.any(np.asarray(after[path]) != np.asarray(before[path]))
            np.testing.assert_allclose(np.asarray(after[path]), np.asarray(value), atol=1e-6)
        else:
            assert after[path] is before[path]


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_sums_are_made_in_fp32_and_rounded_once(dtype):
    """Of a bf16 base: an update below its resolution counts as far as the result can hold it."""
    model, values = filled(abstract(TINY_MOE, **SOME), b=1e-3)
    path = ("layers", "mlp", "experts", "up", "kernel")
    a, b = (np.asarray(values[*path[:-1], f"lora_{x}"], np.float64) for x in "ab")
    w = values[path].astype(jnp.bfloat16)
    graphdef, _ = nnx.split(model)
    low = {p: v if p[-1].startswith("lora") else v.astype(jnp.bfloat16) for p, v in values.items()}
    merged = held(merge_lora(nnx.merge(graphdef, nest(low)), dtype))
    exact = np.asarray(w, np.float64) + 3.0 * a @ b
    found = np.asarray(merged[path])
    assert found.dtype == (dtype or jnp.bfloat16)
    resolution = 2.0 ** (-23 if dtype else -8)
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=resolution, atol=1e-9)
    assert merged["layers", "mlp", "experts", "down", "kernel"].dtype == jnp.bfloat16


def test_an_abstract_model_is_not_merged():
    with pytest.raises(ValueError, match="no values; initialize or load it before merging"):
        merge_lora(abstract(rank=4))


def test_every_expert_has_adapters_of_its_own():
    """So have shared experts and the dense first layer; the router has none."""
    model = abstract(TINY_GLM, rank=4)
    adapters = specs(model, nnx.LoRAParam)
    D, F, E, R, dense, sparse = 64, 32, 8, 4, 1, 1
    assert {p[1:]: s.shape for p, s in adapters.items() if p[0] == "layers" and "mlp" in p} == {
        ("mlp", "experts", "gate", "lora_a"): (sparse, E, D, R),
        ("mlp", "experts", "gate", "lora_b"): (sparse, E, R, F),
        ("mlp", "experts", "up", "lora_a"): (sparse, E, D, R),
        ("mlp", "experts", "up", "lora_b"): (sparse, E, R, F),
        ("mlp", "experts", "down", "lora_a"): (sparse, E, F, R),
        ("mlp", "experts", "down", "lora_b"): (sparse, E, R, D),
        ("mlp", "shared", "gate", "lora_a"): (sparse, D, R),
        ("mlp", "shared", "gate", "lora_b"): (sparse, R, F),
        ("mlp", "shared", "up", "lora_a"): (sparse, D, R),
        ("mlp", "shared", "up", "lora_b"): (sparse, R, F),
        ("mlp", "shared", "down", "lora_a"): (sparse, F, R),
        ("mlp", "shared", "down", "lora_b"): (sparse, R, D),
    }
    assert adapters["dense_layers", "mlp", "up", "lora_a"].shape == (dense, D, R)
    assert adapters["dense_layers", "mlp", "up", "lora_b"].shape == (dense, R, 96)
    assert adapters["dense_layers", "attention", "o", "lora_b"].shape == (dense, R, D)
    assert adapters["layers", "attention", "o", "lora_b"].shape == (sparse, R, D)
    # Experts' adapters lie where the experts do.
    assert all(s.axes[1] == "experts" for p, s in adapters.items() if "experts" in p)
    assert not any("router" in path for path in adapters)


def test_an_experts_b_of_zero_leaves_the_output_alone():
    plain = logits(filled(abstract(TINY_GLM))[0])
    with_lora = logits(filled(abstract(TINY_GLM, rank=4))[0])
    np.testing.assert_allclose(with_lora, plain, atol=1e-6 * np.max(np.abs(plain)))


def test_each_adapters_gradient_is_that_of_its_weight_times_the_other():
    """dA = scale dW B^T and dB = scale A^T dW, where dW is the merged model's; nothing else of the
    expert layers gets any."""
    scale = 32.0 / 4
    model, values = filled(abstract(TINY_GLM, rank=4), b=0.1)
    plain = nnx.graphdef(abstract(TINY_GLM))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 128, (2, 16)))

    def gradient(graphdef, values):
        def loss(values):
            return jnp.mean(nnx.merge(graphdef, nest(values))(tokens) ** 2)

        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(values))

    of_adapters, of_merged = (
        gradient(nnx.graphdef(model), values),
        gradient(plain, merge(values, scale)),
    )
    values, compared = jax.tree.map(np.asarray, values), 0
    for path in [p for p in values if p[-1] == "lora_a"]:
        b, dw = (*path[:-1], "lora_b"), of_merged[*path[:-1], "kernel"]
        expected = (
            (path, scale * dw @ values[b].swapaxes(-1, -2)),
            (b, scale * values[path].swapaxes(-1, -2) @ dw),
        )
        for adapter, expected_grad in expected:
            largest = np.max(np.abs(expected_grad))
            np.testing.assert_allclose(of_adapters[adapter], expected_grad, atol=2e-5 * largest)
            if "experts" in path:  # more of them learn than a token is sent to
                learned = np.max(np.abs(expected_grad), axis=(0, 2, 3)) > 0
                assert np.sum(learned) > TINY_GLM.num_experts_per_tok
            compared += 1
    assert compared == 2 * (7 + 4 + 3 + 3)
    for path, g in of_adapters.items():
        if "mlp" in path and path[-1] in ("kernel", "bias") and "router" not in path:
            assert not np.any(g), path
    assert not np.any(of_adapters["layers", "mlp", "router", "bias"])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_raises(rank):
    with pytest.raises(ValueError, match=f"lora rank {rank} must be at least 1"):
        LoraConfig(rank=rank)


@pytest.mark.parametrize("targets", [("q", "query"), ()])
def test_unknown_or_no_targets_raise(targets):
    with pytest.raises(ValueError, match=r"lora targets \[.*\]: each must be one of q, k, v, o"):
        LoraConfig(targets=targets)
