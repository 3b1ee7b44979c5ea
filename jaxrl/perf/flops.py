"""FLOPs of a decoder in closed form, in the two conventions this project reports, and MFU.

- `primerl_flops_per_token`: as prime-rl's benchmark page counts (bench/baselines): attention over
  the whole T x T square, hidden_size // num_heads for the head size; of experts, those a token is
  sent to, but the adapters of all of them, and no shared expert.
- `model_flops_per_token`: what the mathematics needs: the real head size, only the (query, key)
  pairs a causal mask of each document leaves, the experts (and their adapters) that a token is sent
  to and shared ones, nothing for recomputation.

Both count matrix products only (a multiply and an add: 2), the output head, and no embedding
look-up. Training costs 6 per weight (2 forward, 2 for the input's gradient, 2 for the weight's);
a frozen weight costs 4 (arXiv:2204.02311, appendix B; arXiv:2001.08361).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from jaxrl_kernels.flash_attention.cost import pairs

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# Products over the [T, S] scores. Backward recomputes the scores where they were not kept (flash
# attention, arXiv:2205.14135): hardware does five, the mathematics needs four.
ATTENTION_PRODUCTS = {"forward": 2, "backward": 4, "flash_backward": 5}


class Shapes(Protocol):
    """What of a model's config decides its FLOPs (D, L, N, K, H, F, E, V of the axis alphabet)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_shared_experts(self) -> int: ...
    @property
    def num_sparse_layers(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """`count` linear maps [a, b] of a model that go by the same name in `TARGETS`."""

    target: str
    a: int
    b: int
    count: int


def linears(config: Shapes, *, experts: int, shared: bool = True) -> list[Linear]:
    """The linear maps of all layers, `experts` of each layer's; without router and head."""
    D, H, M = config.hidden_size, config.head_dim, config.moe_intermediate_size
    q, kv = config.num_heads * H, config.num_kv_heads * H
    L, sparse = config.num_layers, config.num_sparse_layers
    maps = [("q", D, q, L), ("k", D, kv, L), ("v", D, kv, L), ("o", q, D, L)]
    mlps = [(config.intermediate_size, L - sparse), (M, sparse * experts)]
    if shared and config.num_shared_experts:  # side by side they are one wide MLP
        mlps.append((config.num_shared_experts * M, sparse))
    for F, count in mlps:
        maps += [("gate", D, F, count), ("up", D, F, count), ("down", F, D, count)]
    return [Linear(*m) for m in maps if m[-1]]


def matmul_params(config: Shapes, *, shared: bool = True) -> int:
    """Weights a token is multiplied with: the layers' linear maps, those of the experts it is sent
    to and of shared ones (unless `shared` is False: the page), routers, the head (tied or not).
    """
    used = linears(config, experts=config.num_experts_per_tok, shared=shared)
    layers = sum(m.count * m.a * m.b for m in used)
    routers = config.num_sparse_layers * config.hidden_size * config.num_experts
    return layers + routers + config.vocab_size * config.hidden_size


def lora_params(config: Shapes, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """Weights of the adapters A [in, R] and B [R, out] on the layers' `targets`, those of every
    expert and shared expert: the page's count."""
    return _adapters(config, config.num_experts, rank, targets)


def active_lora_params(config: Shapes, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """Of `lora_params`, those a token is multiplied with: of the experts it is sent to."""
    return _adapters(config, config.num_experts_per_tok, rank, targets)


def _adapters(config: Shapes, experts: int, rank: int, targets: Sequence[str]) -> int:
    chosen = [m for m in linears(config, experts=experts) if m.target in targets]
    return rank * sum(m.count * (m.a + m.b) for m in chosen)


def attention_flops(
    B: int,
    N: int,
    H: int,
    doc_lengths: int | Sequence[int],
    *,
    causal: bool = True,
    which: str = "forward",
) -> int:
    """FLOPs of one attention op over B equal rows, N query heads of size H.

    `doc_lengths`: tokens of each document of a row (one number: a single document); a token sees
    its own document only, itself included, and with `causal` nothing after itself. `which` is a
    key of `ATTENTION_PRODUCTS`; each product is 2 H FLOPs per head and (query, key) pair.
    """
    lengths = [doc_lengths] if isinstance(doc_lengths, int) else doc_lengths
    return ATTENTION_PRODUCTS[which] * 2 * B * N * H * pairs(lengths, causal=causal)


def model_flops_per_step(
    config: Shapes,
    doc_lengths: int | Sequence[int],
    *,
    lora_params: int = 0,
    prefixes: Sequence[int] = (),
) -> int:
    """FLOPs to train once on these documents (forward and backward), by `model_flops_per_token`'s
    convention. `doc_lengths`: tokens of every document of the step (one number: just one).
    prefixes: of each, tokens of another document that its own see as well.
    """
    tokens = doc_lengths if isinstance(doc_lengths, int) else sum(doc_lengths)
    dense = (4 if lora_params else 6) * matmul_params(config) + 6 * lora_params
    attention = sum(
        attention_flops(1, config.num_heads, config.head_dim, doc_lengths, which=which)
        for which in ("forward", "backward")
    )
    if prefixes:
        assert not isinstance(doc_lengths, int)
        seen = sum(a * b for a, b in zip(doc_lengths, prefixes, strict=True))
        products = ATTENTION_PRODUCTS["forward"] + ATTENTION_PRODUCTS["backward"]
        attention += products * 2 * config.num_heads * config.head_dim * seen
    return dense * tokens + config.num_layers * attention


def model_flops_per_token(
    config: Shapes, doc_lengths: int | Sequence[int], *, lora_params: int = 0
) -> float:
    """FLOPs to train on one token, forward and backward; `mfu`'s numerator.

    `doc_lengths`: the sequence length, or the lengths of the documents packed into the batch.
    `lora_params` > 0 (with experts, `active_lora_params`): every other weight is frozen and costs
    4 instead of 6 (also in the first layer, whose input's gradient nobody needs). Recomputed
    activations do not count.
    """
    tokens = doc_lengths if isinstance(doc_lengths, int) else sum(doc_lengths)
    if tokens < 1:
        raise ValueError(f"documents of {doc_lengths} tokens: there must be at least one token")
    return model_flops_per_step(config, doc_lengths, lora_params=lora_params) / tokens


def primerl_flops_per_token(config: Shapes, seq_len: int, *, lora_params: int = 0) -> int:
    """FLOPs per trained token as prime-rl's page counts them; reproduces its MFU column.

    `lora_params`: of all adapters, whoever uses them.
    """
    head_size = config.hidden_size // config.num_heads
    attention = 12 * config.num_layers * config.num_heads * head_size * seq_len
    dense = (4 if lora_params else 6) * matmul_params(config, shared=False) + 6 * lora_params
    return dense + attention


def mfu(flops_per_token: float, tps: float, peak: float, num_gpus: int = 1) -> float:
    """Model FLOPs utilisation, a fraction: tokens per second of all GPUs over FLOP/s of them all.

    `peak`: FLOP/s of one GPU (`hardware.Gpu.bf16_flops` or `.primerl_bf16_flops`).
    """
    return flops_per_token * tps / (peak * num_gpus)


def cost_analysis_flops(lower: Callable[[int], jax.stages.Lowered], num_layers: int) -> float:
    """XLA's own FLOP count of a program of `num_layers` equal layers, nothing compiled.

    `lower(n)` lowers the program with n layers, *unrolled*: XLA counts a loop's body once and a
    custom call as nothing. Each layer's weights are arguments of their own: slices of stacked
    weights get gradients that are summed over the whole stack, n^2 work. Then the count is linear
    in n, and only one and two layers are lowered. Raises ValueError where it does not grow, which
    is how a loop over layers shows.
    """
    one, two = (_cost(lower(n)) for n in (1, 2))
    if not two > one:
        raise ValueError(
            f"XLA counts {one:.4g} FLOPs for one layer and {two:.4g} for two; unroll the loop over "
            "layers, whose body it counts once"
        )
    return one + (num_layers - 1) * (two - one)


def _cost(lowered: jax.stages.Lowered) -> float:
    analysis = lowered.cost_analysis()
    if not analysis or "flops" not in analysis:
        raise ValueError("XLA gave no cost analysis; lower for CPU")
    return analysis["flops"]
