"""Logits and gradients equal those of transformers, recorded by tests/golden/generate.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxrl import load_pretrained
from jaxrl.models.hf import hf_names
from jaxrl.models.hf_config import read_config
from jaxrl.models.params import Buffer, specs
from jaxrl.models.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(f.parent.name for f in GOLDEN.glob("*/golden.safetensors"))


def relative_error(value, reference) -> float:
    """Largest absolute difference over the largest absolute reference value of the tensor."""
    assert value.shape == reference.shape
    return float(np.abs(np.asarray(value) - reference).max() / np.abs(reference).max())


def load(case: str):
    """(graphdef, parameters as a nested dict, declarations, golden arrays) of a case, in fp32."""
    model = load_pretrained(GOLDEN / case, dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    golden = load_file(GOLDEN / case / "golden.safetensors")
    return graphdef, nnx.to_pure_dict(state), specs(model), golden


def test_the_cases_are_there():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case):
    graphdef, params, declared, golden = load(case)

    def loss(params):
        logits = nnx.merge(graphdef, params)(golden["tokens"])
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, golden["labels"][..., None], axis=-1)
        return -jnp.mean(chosen), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(logits, golden["logits"]) <= 1e-5
    compared = set()
    for path, spec in declared.items():
        grad = grads
        for key in path:
            grad = grad[key]
        for name, index in hf_names(spec):
            g = np.asarray(grad)[index]
            if spec.kind is Buffer:
                assert not g.any(), f"{name} is no parameter"
                continue
            error = relative_error(g.T if spec.hf_transposed else g, golden[f"grad.{name}"])
            assert error <= 1e-5, f"gradient of {name}: {error:.1e}"
            compared.add(f"grad.{name}")
    assert compared == {name for name in golden if name.startswith("grad.")}


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama3_rope_tied", {"rope_scaling": None}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 2}),
        ("qwen3_moe_unnormalized_tied", {"norm_topk_prob": True}),
        ("glm4_moe", {"partial_rotary_factor": 1.0}),
        ("glm4_moe", {"routed_scaling_factor": 1.0}),
        ("glm4_moe", {"norm_topk_prob": False}),
        ("glm4_moe", {"no correction": True}),
        ("glm4_moe_qk_norm", {"no correction": True}),
    ],
)
def test_the_cases_depend_on_what_they_are_for(case, change):
    """Guards the golden files: without it the logits would be far from the recorded ones."""
    _, params, _, golden = load(case)
    if "no correction" in change:
        router, change = params["layers"]["mlp"]["router"], {}
        assert router["bias"].any()
        router["bias"] = jnp.zeros_like(router["bias"])
    config = read_config(GOLDEN / case).replace(**change)
    graphdef, _ = nnx.split(Transformer(config))
    logits = jax.jit(lambda p: nnx.merge(graphdef, p)(jnp.asarray(golden["tokens"])))(params)
    assert relative_error(logits, golden["logits"]) > 0.05


@pytest.mark.parametrize("case", [case for case in CASES if "moe" in case])
def test_the_tokens_of_the_cases_choose_different_experts(case):
    """Every expert learns from some token, though each token goes to 3 of the 8."""
    golden = load_file(GOLDEN / case / "golden.safetensors")
    grads = [g for name, g in golden.items() if "mlp.experts." in name]
    assert len(grads) == 2 * 8 * 3  # layers, experts, matrices
    assert all(np.abs(g).max() > 1e-6 for g in grads)


def test_packed_documents_get_the_logits_of_each_alone():
    graphdef, params, _, golden = load("qwen3_tied")
    logits = jax.jit(lambda p, *inputs: nnx.merge(graphdef, p)(*inputs))
    lengths, row = (11, 1, 20, 16), golden["tokens"][:1]
    starts = np.cumsum((0, *lengths))
    assert starts[-1] == row.shape[1]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    packed = np.asarray(logits(params, row, positions, segment_ids))
    one_document = np.asarray(logits(params, row, positions, np.ones_like(segment_ids)))

    # One document a row; what follows it in the row is padding, which causality hides.
    alone = np.zeros((len(lengths), max(lengths)), row.dtype)
    for d, n in enumerate(lengths):
        alone[d, :n] = row[0, starts[d] : starts[d] + n]
    alone = np.asarray(logits(params, alone))
    for d, n in enumerate(lengths):
        document = slice(starts[d], starts[d] + n)
        assert relative_error(packed[0, document], alone[d, :n]) <= 1e-5
        if d:  # Guards the test: it would not pass if segment ids did nothing.
            assert relative_error(one_document[0, document], alone[d, :n]) > 0.01
