"""Closed-form FLOPs against the published page, XLA's own count, and hand counts."""

import csv
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import TINY, TINY_GLM, TINY_MOE, tiny_program

from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.params import specs
from jaxrl.models.presets import preset
from jaxrl.models.transformer import Transformer
from jaxrl.perf import plan
from jaxrl.perf.flops import (
    active_lora_params,
    attention_flops,
    cost_analysis_flops,
    lora_params,
    matmul_params,
    mfu,
    model_flops_per_step,
    model_flops_per_token,
    primerl_flops_per_token,
)
from jaxrl.perf.hardware import gpu

PAGE = pathlib.Path(__file__).parents[2] / "bench/baselines/prime_rl.csv"


def page_rows():
    with PAGE.open() as file:
        return list(csv.DictReader(file))


@dataclasses.dataclass(frozen=True)
class Tiny:
    hidden_size: int = 4
    num_layers: int = 3
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 8
    intermediate_size: int = 5
    vocab_size: int = 7
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    num_sparse_layers: int = 0


# Layer 1 dense, layers 2 and 3 with 6 experts of width 3, of which a token gets 2; 2 shared ones.
SPARSE = Tiny(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=3,
    num_shared_experts=2,
    num_sparse_layers=2,
)


def test_all_rows_of_the_page_are_there():
    assert len(page_rows()) == 70


@pytest.mark.parametrize(
    "row", page_rows(), ids=lambda r: "-".join([*list(r.values())[:6], r["num_gpus"], r["gpu"]])
)
def test_the_page_reports_this_mfu(row):
    config, g = preset(row["model"]), gpu(row["gpu"])
    adapters = lora_params(config, int(row["lora_rank"] or 0))
    flops = primerl_flops_per_token(config, int(row["seq_len"]), lora_params=adapters)
    tps, printed = float(row["tps"]), float(row["mfu_pct"])
    ours = 100 * mfu(flops, tps, g.primerl_bf16_flops, int(row["num_gpus"]))
    rounding = 0.05 + ours * 5 / tps  # MFU is printed to 0.1 %, TPS to 10 tokens
    assert abs(ours - printed) <= max(rounding, 0.002 * printed)


def test_matmul_params_by_hand():
    # q 4x16, k and v 4x8, o 16x4, three of 4x5; head 7x4.
    assert matmul_params(Tiny()) == 3 * (64 + 32 + 32 + 64 + 60) + 28


def test_lora_params_by_hand():
    assert lora_params(Tiny(), 2, ("q", "down")) == 3 * 2 * ((4 + 16) + (5 + 4))


def test_experts_by_hand():
    attention, router, expert = 64 + 32 + 32 + 64, 4 * 6, 3 * 4 * 3
    assert matmul_params(SPARSE) == 3 * attention + 60 + 2 * (router + (2 + 2) * expert) + 28
    assert matmul_params(SPARSE) - matmul_params(SPARSE, shared=False) == 2 * 2 * expert
    dense, shared = 3 * (4 + 5), 3 * (4 + 6)
    adapters = 3 * ((4 + 16) + 2 * (4 + 8) + (16 + 4)) + dense + 2 * shared
    assert lora_params(SPARSE, 5) == 5 * (adapters + 2 * 6 * 3 * (4 + 3))
    assert active_lora_params(SPARSE, 5) == 5 * (adapters + 2 * 2 * 3 * (4 + 3))
    assert active_lora_params(SPARSE, 5, ("q",)) == lora_params(SPARSE, 5, ("q",)) == 5 * 3 * 20


@pytest.mark.parametrize("config", [TINY_MOE, TINY_GLM], ids=lambda c: c.name)
def test_experts_of_the_real_model(config):
    """A layer's weights are all used but for the experts that a token is not sent to."""
    linears = {
        path: spec.size
        for path, spec in specs(Transformer(config)).items()
        if path[-1] == "kernel" and len(spec.shape) > 1
    }
    total = sum(linears.values()) + config.vocab_size * config.hidden_size
    idle = config.num_experts - config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert matmul_params(config) == total - config.num_sparse_layers * idle * expert
    adapters = specs(add_lora(Transformer(config), LoraConfig(rank=4)), nnx.LoRAParam)
    assert lora_params(config, 4) == sum(spec.size for spec in adapters.values())


@pytest.mark.parametrize(
    "lengths, causal, pairs",
    [(4, True, 10), (4, False, 16), ([3, 1], True, 7), ([3, 1], False, 10)],
)
def test_attention_by_hand(lengths, causal, pairs):
    def flops(which):
        return attention_flops(5, 2, 8, lengths, causal=causal, which=which)

    assert flops("forward") == 5 * 2 * pairs * (2 * 2 * 8)
    assert flops("backward") == 2 * flops("forward")
    assert flops("flash_backward") == 2.5 * flops("forward")


def test_model_flops_by_hand():
    attention = 3 * 6 * 2 * 2 * 8 * 10  # L layers, 6 products, N heads of H, 4*5/2 pairs
    params = matmul_params(Tiny())
    assert model_flops_per_step(Tiny(), 4) == 6 * params * 4 + attention
    assert model_flops_per_token(Tiny(), 4) == 6 * params + attention / 4
    lora = model_flops_per_token(Tiny(), 4, lora_params=11)
    assert lora == 4 * params + 6 * 11 + attention / 4


def test_packing_pays_only_for_its_documents():
    config = preset("Qwen3-0.6B")
    one, packed = (model_flops_per_token(config, n) for n in (4096, [1024] * 4))
    assert packed == model_flops_per_token(config, 1024) < one


def test_conventions_differ_by_head_size_and_causality():
    config = preset("Qwen3-4B-Instruct-2507")
    ours = model_flops_per_token(config, 65536)
    theirs = primerl_flops_per_token(config, 65536)
    dense = 6 * matmul_params(config)
    heads = config.num_heads * config.head_dim / config.hidden_size
    assert (ours - dense) / (theirs - dense) == pytest.approx(heads / 2, rel=1e-4)


def test_no_tokens():
    with pytest.raises(ValueError, match="at least one token"):
        model_flops_per_token(Tiny(), [])


def test_mfu():
    assert mfu(2e9, 1e4, 1e13, 4) == 0.5


BIG = Tiny(256, 7, 4, 2, 64, 1024, 4096)


def lower_decoder(num_layers, *, scan=False):
    """Gradient of a decoder of BIG's shapes, without causality, over one sequence of 512."""
    c, T = BIG, 512
    D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
    shapes = {
        "q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D),
        "gate": (D, F), "up": (D, F), "down": (F, D),
    }  # fmt: skip

    def layer(x, w):
        q = jnp.einsum("TD,DNH->TNH", x, w["q"]).reshape(T, K, N // K, H)
        k, v = (jnp.einsum("TD,DKH->TKH", x, w[name]) for name in "kv")
        p = jax.nn.softmax(jnp.einsum("TKGH,SKH->KGTS", q, k))
        x = x + jnp.einsum(
            "TNH,NHD->TD", jnp.einsum("KGTS,SKH->TKGH", p, v).reshape(T, N, H), w["o"]
        )
        return x + (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    def loss(params, x):
        weights, head = params
        if scan:
            x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)
        else:
            for i in range(num_layers):
                x = layer(x, weights[i])
        return jnp.sum((x @ head) ** 2)

    f32 = jnp.float32
    if scan:
        weights = {k: jax.ShapeDtypeStruct((num_layers, *s), f32) for k, s in shapes.items()}
    else:
        weights = [{k: jax.ShapeDtypeStruct(s, f32) for k, s in shapes.items()}] * num_layers
    head = jax.ShapeDtypeStruct((D, c.vocab_size), f32)
    x = jax.ShapeDtypeStruct((T, D), f32)
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower((weights, head), x)


def test_xla_counts_the_same_within_one_percent():
    attention = BIG.num_layers * sum(
        attention_flops(1, BIG.num_heads, BIG.head_dim, 512, causal=False, which=which)
        for which in ("forward", "backward")
    )
    closed = 6 * matmul_params(BIG) * 512 + attention
    # The input needs no gradient here: q, k and v of the first layer pass none on.
    skipped = 2 * 512 * BIG.hidden_size * (BIG.num_heads + 2 * BIG.num_kv_heads) * BIG.head_dim
    xla = cost_analysis_flops(lower_decoder, BIG.num_layers)
    assert xla == pytest.approx(closed - skipped, rel=0.01)


def test_extrapolation_is_exact():
    full = lower_decoder(BIG.num_layers).cost_analysis()["flops"]
    assert cost_analysis_flops(lower_decoder, BIG.num_layers) == pytest.approx(full, rel=1e-9)


def test_a_loop_over_layers_is_refused():
    with pytest.raises(ValueError, match="unroll the loop over layers"):
        cost_analysis_flops(lambda n: lower_decoder(n, scan=True), 4)


def test_the_blocked_attention_counts_the_blocks_it_visits():
    """On a CPU: of each block two products forward, and five backward."""
    program = tiny_program(type="sft", seq_len=512, rows=2, ac="none")
    text = program.lower().compile().as_text() or ""
    # Blocks of 64: 36 of them; of the first document's four rows 10, of the second's 2 to 5 each.
    whole, documents = (plan.hardware_flops(program, text, docs) for docs in (None, (228, 284)))
    product = 2 * 64 * 64 * TINY.num_heads * TINY.head_dim
    # 72 and 48 visits of two rows, 32 at a time: one round less.
    left = TINY.num_layers * program.micro_batches * 32 * 7 * product
    assert whole - documents == pytest.approx(left)


def test_documents_that_go_on_from_another_see_it():
    """A prompt of 5 tokens, once, and what 3 and 4 tokens behind it cost of whole documents."""
    shared = model_flops_per_step(Tiny(), [5, 3, 4], prefixes=[0, 5, 5])
    whole = [model_flops_per_step(Tiny(), n) for n in (5, 8, 9)]
    assert shared == whole[1] + whole[2] - whole[0]
