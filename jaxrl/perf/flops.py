"""FLOPs of a decoder in closed form, in the two conventions this project reports, and MFU.

- `primerl_flops_per_token`: as prime-rl's benchmark page counts (bench/baselines): attention over
  the whole T x T square, hidden_size // num_heads for the head size.
- `model_flops_per_token`: what the mathematics needs: the real head size, only the (query, key)
  pairs a causal mask of each document leaves, nothing for recomputation.

Both count matrix products only (a multiply and an add: 2), the output head, and no embedding
look-up. Training costs 6 per weight (2 forward, 2 for the input's gradient, 2 for the weight's);
a frozen weight costs 4 (arXiv:2204.02311, appendix B; arXiv:2001.08361).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from jaxrl_kernels.flash_attention.cost import pairs

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# Products over the [T, S] scores. Backward recomputes the scores where they were not kept (flash
# attention, arXiv:2205.14135): hardware does five, the mathematics needs four.
ATTENTION_PRODUCTS = {"forward": 2, "backward": 4, "flash_backward": 5}


class Shapes(Protocol):
    """What of a model's config decides its FLOPs (D, L, N, K, H, F, V of the axis alphabet)."""

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


def linear_shapes(config: Shapes) -> dict[str, tuple[int, int]]:
    """[in, out] of each linear map of one layer, by its name in `TARGETS`."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * H, config.num_kv_heads * H
    return {
        "q": (D, q),
        "k": (D, kv),
        "v": (D, kv),
        "o": (q, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }


def matmul_params(config: Shapes) -> int:
    """Weights a token is multiplied with: every layer's linear maps and the head (tied or not)."""
    layer = sum(a * b for a, b in linear_shapes(config).values())
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def lora_params(config: Shapes, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """Weights of the adapters A [in, R] and B [R, out] on each layer's `targets`."""
    shapes = linear_shapes(config)
    return config.num_layers * rank * sum(sum(shapes[t]) for t in targets)


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
    config: Shapes, doc_lengths: int | Sequence[int], *, lora_params: int = 0
) -> int:
    """FLOPs to train once on these documents (forward and backward), by `model_flops_per_token`'s
    convention. `doc_lengths`: tokens of every document of the step (one number: just one).
    """
    tokens = doc_lengths if isinstance(doc_lengths, int) else sum(doc_lengths)
    dense = (4 if lora_params else 6) * matmul_params(config) + 6 * lora_params
    attention = config.num_layers * sum(
        attention_flops(1, config.num_heads, config.head_dim, doc_lengths, which=which)
        for which in ("forward", "backward")
    )
    return dense * tokens + attention


def model_flops_per_token(
    config: Shapes, doc_lengths: int | Sequence[int], *, lora_params: int = 0
) -> float:
    """FLOPs to train on one token, forward and backward; `mfu`'s numerator.

    `doc_lengths`: the sequence length, or the lengths of the documents packed into the batch.
    `lora_params` > 0: every other weight is frozen and costs 4 instead of 6 (also in the first
    layer, whose input's gradient nobody needs). Recomputed activations do not count.
    """
    tokens = doc_lengths if isinstance(doc_lengths, int) else sum(doc_lengths)
    if tokens < 1:
        raise ValueError(f"documents of {doc_lengths} tokens: there must be at least one token")
    return model_flops_per_step(config, doc_lengths, lora_params=lora_params) / tokens


def primerl_flops_per_token(config: Shapes, seq_len: int, *, lora_params: int = 0) -> int:
    """FLOPs per trained token as prime-rl's page counts them; reproduces its MFU column."""
    head_size = config.hidden_size // config.num_heads
    attention = 12 * config.num_layers * config.num_heads * head_size * seq_len
    dense = (4 if lora_params else 6) * matmul_params(config) + 6 * lora_params
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
