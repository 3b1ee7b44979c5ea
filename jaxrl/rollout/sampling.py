"""Drawing the next token of each sequence from its logits, reproducibly.

No sort: each of top-k, top-p and min-p keeps the tokens whose logit is at or above a threshold,
which a search over the bits of a float finds exactly; without them nothing is searched for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """How each of B sequences is sampled, one number each.

    temperature: logits are divided by it; 0: the most likely token. top_k: only the k most likely
    tokens (0: all). top_p: only the fewest most likely ones of those that have this much of their
    probability (arXiv:1904.09751; 1: all). min_p: only those with this much of the most likely
    one's probability (arXiv:2407.01082; 0: all). Of equal tokens at a threshold all are kept.
    seed: of the sequence; `index`: how many of its tokens were drawn before. Both decide the draw,
    and nothing else does: not the other sequences, not when it is made.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: Int[Array, " B"]


def sample(
    logits: Float[Array, "B V"], choice: Choice, index: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(the token, its log-prob) of each sequence; logits fp32.

    The log-prob is that of the whole vocabulary at the sequence's temperature, as training computes
    it, whatever top_k, top_p and min_p left out; at temperature 0 that of temperature 1.
    """
    greedy = choice.temperature == 0
    logits = logits / jnp.where(greedy, 1.0, choice.temperature)[:, None]
    z = logits - jnp.max(logits, axis=-1, keepdims=True)
    filtered = (choice.top_k > 0) | (choice.top_p < 1) | (choice.min_p > 0)
    lowest = jax.lax.cond(
        jnp.any(filtered & ~greedy),
        lambda: jnp.where(filtered, _threshold(z, choice), -jnp.inf),
        lambda: jnp.full(greedy.shape, -jnp.inf),
    )
    p = jnp.exp(z)
    u = jax.vmap(_uniform)(choice.seed, index)
    drawn = _draw(jnp.where(z >= lowest[:, None], p, 0.0), u)
    # The first of the likeliest: argmax, which takes four times as long on a CPU.
    V = z.shape[-1]
    likeliest = jnp.min(jnp.where(z == 0, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)
    token = jnp.where(greedy, likeliest, drawn).astype(jnp.int32)
    picked = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0]
    return token, picked - jnp.log(jnp.sum(p, axis=-1))


def _uniform(seed: Array, index: Array) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), index))


def _draw(p: Float[Array, "B V"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which the running sum of p passes u of its total: over blocks, then within."""
    B, V = p.shape
    p = jnp.pad(p, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    sums = jnp.sum(p, axis=-1)  # [B, blocks]
    rest = u * jnp.sum(sums, axis=-1)
    block, rest = _passes(sums, rest)
    within, _ = _passes(jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0], rest)
    return block * _BLOCK + within


def _passes(p: Float[Array, "B n"], target: Float[Array, " B"]):
    """(where the running sum of p passes the target, what of the target is left there). Never a
    place where p is 0, whatever the sum's rounding."""
    total = jnp.cumsum(p, axis=-1)
    place = jnp.sum(total <= target[:, None], axis=-1)
    last = p.shape[-1] - 1 - jnp.argmax(p[:, ::-1] > 0, axis=-1)
    place = jnp.minimum(place, last)
    here = place[:, None]
    before = jnp.take_along_axis(total, here, -1) - jnp.take_along_axis(p, here, -1)
    return place, target - before[:, 0]


def _threshold(z: Float[Array, "B V"], choice: Choice) -> Float[Array, " B"]:
    """The lowest kept z of each sequence, of which the highest is 0."""
    # Of numbers that are not positive the bits of the absolute value fall as the number rises.
    bits = jax.lax.bitcast_convert_type(jnp.abs(z), jnp.int32)
    p = jnp.exp(z)
    V = z.shape[-1]
    k = jnp.where(choice.top_k > 0, jnp.minimum(choice.top_k, V), V)
    by_k = _search(lambda t: jnp.sum(bits <= t[:, None], axis=-1) >= k, len(k))

    def mass(t):
        return jnp.sum(jnp.where(bits <= t[:, None], p, 0.0), axis=-1)

    wanted = choice.top_p * mass(by_k)
    by_p = jnp.where(choice.top_p < 1, _search(lambda t: mass(t) >= wanted, len(k)), by_k)
    lowest = -jax.lax.bitcast_convert_type(jnp.minimum(by_k, by_p), jnp.float32)
    return jnp.maximum(lowest, jnp.log(choice.min_p))


def _search(enough, count: int) -> Int[Array, " B"]:
    """The least bits t, of each of `count` sequences, for which `enough(t)`; rising in t."""
    top = np.float32(np.inf).view(np.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        yes = enough(middle)
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    low, high = jnp.zeros(count, jnp.int32), jnp.full(count, top, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]
