"""Keys and values of the tokens that sequences are at, in pages.

A page holds `size` tokens of one sequence, in every layer. Sequences that begin alike share the
pages of what they have in common. Page 0 of every device is nobody's: what is not to be kept is
written there.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NOBODYS = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The pages on the devices; inside `shard_map` those of one device. Tokens of one head are
    neighbours, as attention's products take them: read so, nothing is transposed."""

    k: Float[Array, "L pages K size H"]
    v: Float[Array, "L pages K size H"]

    @property
    def page_size(self) -> int:
        return self.k.shape[3]

    def write(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        pages: Int[Array, "B T"],
        places: Int[Array, "B T"],
    ) -> "Cache":
        """With tokens written into `pages` at `places` within them."""
        heads = jnp.arange(k.shape[2])
        return self._with((layer, pages[..., None], heads, places[..., None]), k, v)

    def write_pages(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        table: Int[Array, "B P"],
    ) -> "Cache":
        """With whole pages written: T = P x size."""
        B, P = table.shape

        def in_pages(x):
            x = x.reshape(B, P, self.page_size, *x.shape[2:])
            return jnp.swapaxes(x, 2, 3)  # [B, P, K, size, H]

        return self._with((layer, table), in_pages(k), in_pages(v))

    def read(
        self, layer: Int[Array, ""], table: Int[Array, "B P"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Keys and values of the sequences whose pages the table lists, in order; S = P x size."""
        B, P = table.shape
        K, size, H = self.k.shape[2:]
        heads = jnp.arange(K)[:, None]

        def flat(x):
            return x[layer, table[:, None], heads].reshape(B, K, P * size, H)

        return flat(self.k), flat(self.v)

    def copy(self, source: Int[Array, " n"], to: Int[Array, " n"]) -> "Cache":
        """With pages copied onto others, in all layers."""
        return self._with((slice(None), to), self.k[:, source], self.v[:, source])

    def _with(self, place, k, v) -> "Cache":
        dtype = self.k.dtype
        return Cache(self.k.at[place].set(k.astype(dtype)), self.v.at[place].set(v.astype(dtype)))


def attend_cached(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, " B"],
) -> Float[Array, "B 1 N H"]:
    """Attention of one token of each sequence to those up to its own position; sums in fp32."""
    B, _, N, H = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, K, N // K, H)  # [B, 1, N, H] -> groups of queries by key head
    f32 = jnp.float32
    scores = jnp.einsum("BKGH,BKSH->BKGS", q, k, preferred_element_type=f32) * H**-0.5
    seen = jnp.arange(S) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    # What stands behind is of whoever had the page: 0 times what is not finite is not 0.
    v = jnp.where(seen[:, None, :, None], v, jnp.zeros((), v.dtype))
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(v.dtype), v, preferred_element_type=f32)
    return out.reshape(B, 1, N, H).astype(q.dtype)


class Pages:
    """Which pages of one device are free, and how many sequences use each other one."""

    def __init__(self, count: int):
        self._free = list(range(count - 1, NOBODYS, -1))
        self._users = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages; there are that many free."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more sequence uses these."""
        for page in pages:
            self._users[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One sequence fewer uses these."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
