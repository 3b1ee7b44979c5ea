"""Made-up choices of experts, for benchmarks of what the exchange and the experts' products see.

Random weights on random tokens route like nothing that was ever trained. `balanced` is the best
case that a load-balanced model approaches, `zipf` one in which few experts get most tokens.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Routing = Literal["model", "balanced", "zipf"]
MODES = get_args(Routing)


def expert_choices(
    mode: str,
    num_tokens: int,
    num_experts: int,
    per_token: int,
    key: jax.Array,
    part: int | Array = 0,
) -> Int[Array, "T k"]:
    """`per_token` distinct experts for each of `num_tokens` tokens.

    balanced: every expert is chosen equally often, to one choice. zipf: an expert's chances fall as
    1 / rank, drawn without replacement (Gumbel top-k, arXiv:1903.06059); which expert has which
    rank is random, and the same for every `part` of the tokens (a device's), which draws its own.
    Raises ValueError for another mode.
    """
    names = jax.random.permutation(jax.random.fold_in(key, 0), num_experts)
    draw = jax.random.fold_in(jax.random.fold_in(key, 1), part)
    match mode:
        case "balanced":
            turn = jax.random.permutation(draw, num_tokens)[:, None] * per_token
            ranks = (turn + jnp.arange(per_token)) % num_experts
        case "zipf":
            chance = -jnp.log1p(jnp.arange(num_experts, dtype=jnp.float32))
            noise = jax.random.gumbel(draw, (num_tokens, num_experts))
            ranks = jax.lax.top_k(chance + noise, per_token)[1]
        case _:
            raise ValueError(f"unknown routing {mode!r}; one of balanced, zipf")
    return names[ranks].astype(jnp.int32)
