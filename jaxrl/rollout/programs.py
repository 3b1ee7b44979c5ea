"""The model as it samples: prefill writes a prompt's keys and values, decode draws tokens.

Both run the one decoder on the arrays that training updates, in their shardings: inside `shard_map`
each layer is gathered as it is used, as in the training step, and sequences are divided over all
devices. To gather every layer for every token takes longer than to draw it: where memory allows,
each device holds a copy of all layers instead. Each shape is compiled once; the engine chooses
among few.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxrl.models.attention import LayerContext
from jaxrl.models.layers import rope_tables
from jaxrl.models.moe import ExpertOps
from jaxrl.models.params import nest, specs
from jaxrl.models.transformer import Transformer
from jaxrl.ops.attention import resolve_attention
from jaxrl.ops.grouped_matmul import resolve_grouped_matmul
from jaxrl.ops.registry import Target
from jaxrl.parallel import vocab
from jaxrl.parallel.dispatch import in_order
from jaxrl.parallel.expert import make_exchange
from jaxrl.parallel.mesh import CPU_OPTIONS
from jaxrl.parallel.sharding import EVERYWHERE, check_divides, gather, partition_spec, undivided
from jaxrl.rollout.cache import NOBODYS, Cache, attend_cached
from jaxrl.rollout.sampling import Choice, sample

STACKS = ("dense_layers", "layers")  # of the model's parts, those that layers lie in
ROWS = PartitionSpec(EVERYWHERE)
PAGES = PartitionSpec(None, EVERYWHERE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """B sequences that tokens are drawn for, those of each device together.

    token: the last of each, whose keys are not in the cache yet; position: its own. table: pages,
    enough for all tokens that will be drawn, NOBODYS behind them. drawn: how many tokens were drawn
    before; left: how many more may be (0: not a sequence). stop: tokens that end it, padded with
    -1.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    table: Int[Array, "B P"]
    drawn: Int[Array, " B"]
    left: Int[Array, " B"]
    stop: Int[Array, "B n"]
    choice: Choice


class Programs:
    """`prefill`, `decode` and `copy_pages`, jitted for a model on a mesh; they donate the cache.

    weights: a nested dict with every parameter of the model (adapters too), sharded as
    `parallel.sharding` says, in any dtype; `dtype` is that of activations and of the cache.
    whole_layers: weights are what `own` makes of those, with the layers whole on each device.
    `traced` counts how often each was traced, which is how often it was compiled.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        dtype,
        attention: str = "auto",
        grouped_matmul: str = "auto",
        whole_layers: bool = False,
    ):
        self.whole_layers = whole_layers
        self.model, self.mesh, self.dtype = model, mesh, jnp.dtype(dtype)
        self.target = Target.of(mesh.devices.flat[0])
        self.attention = attention
        self.traced = collections.Counter()
        declared = specs(model)
        for path, spec in declared.items():
            check_divides(path, spec, mesh)
        divided = {p: partition_spec(s.axes) for p, s in declared.items()}
        if whole_layers:
            divided |= {p: undivided(spec) for p, spec in divided.items() if p[0] in STACKS}
        self.partition = nest(divided)
        self._fp32 = nest({p: s.fp32 for p, s in declared.items()})
        self._experts = self._expert_ops(grouped_matmul)
        self._copy: Callable[[Any], Any] | None = None
        self._moves: dict[tuple[bool, ...], Callable[[Any], Any]] = {}
        replicated = PartitionSpec()
        options = CPU_OPTIONS if self.target.backend == "cpu" and mesh.size > 1 else None
        jit = functools.partial(jax.jit, compiler_options=options)
        over = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        self.prefill = in_order(
            jit(
                over(self._prefill, in_specs=(self.partition, PAGES, ROWS, ROWS), out_specs=PAGES),
                donate_argnums=1,
            )
        )
        decode = jit(
            lambda weights, cache, decoding, steps: over(
                functools.partial(self._decode, steps=steps),
                in_specs=(self.partition, PAGES, ROWS),
                out_specs=(PAGES, replicated, replicated),
            )(weights, cache, decoding),
            donate_argnums=1,
            static_argnums=3,
        )
        self.jitted_decode = decode
        self.decode = in_order(decode)
        self.copy_pages = in_order(
            jit(
                over(self._copy_pages, in_specs=(PAGES, ROWS, ROWS), out_specs=PAGES),
                donate_argnums=0,
            )
        )

    def abstract_own(self, weights: Any) -> Any:
        """Shapes and shardings of what `own` makes of parameters, which may be abstract."""
        if not self.whole_layers:
            return weights

        def like(a: Any, spec: PartitionSpec, wide: bool) -> jax.ShapeDtypeStruct:
            dtype = jnp.float32 if wide else self.dtype
            return jax.ShapeDtypeStruct(a.shape, dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(like, weights, self.partition, self._fp32)

    def own(self, weights: Any) -> Any:
        """Parameters as these programs take them: with `whole_layers` copies of those that are not
        yet in their place and dtype, else the arrays that were given."""
        if not self.whole_layers:
            return weights
        arrays, tree = jax.tree.flatten(weights)
        places = jax.tree.leaves(self.abstract_own(weights))
        there = tuple(
            a.dtype == p.dtype and a.sharding.is_equivalent_to(p.sharding, a.ndim)
            for a, p in zip(arrays, places, strict=True)
        )
        if there not in self._moves:
            moved = [p for p, here in zip(places, there, strict=True) if not here]
            self._moves[there] = jax.jit(
                lambda given: [a.astype(p.dtype) for a, p in zip(given, moved, strict=True)],
                out_shardings=[p.sharding for p in moved],
            )
        given = [a for a, here in zip(arrays, there, strict=True) if not here]
        copied = iter(in_order(self._moves[there])(given))
        return tree.unflatten(
            [a if here else next(copied) for a, here in zip(arrays, there, strict=True)]
        )

    def copy_weights(self, weights: Any) -> Any:
        """A copy of parameters, in the dtypes that they are used in, as `own` places them."""
        if self._copy is None:

            def copy(a: jax.Array, wide: bool) -> jax.Array:
                return jnp.array(a, jnp.float32 if wide else self.dtype, copy=True)

            shardings = jax.tree.map(lambda p: NamedSharding(self.mesh, p), self.partition)
            self._copy = jax.jit(
                lambda weights: jax.tree.map(copy, weights, self._fp32), out_shardings=shardings
            )
        return self._copy(weights)

    def make_cache(self, pages: int, page_size: int) -> Cache:
        """Of `pages` pages on every device."""
        like = self.abstract_cache(pages, page_size)
        make = jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like),
            out_shardings=NamedSharding(self.mesh, PAGES),
        )
        return make()

    def abstract_cache(self, pages: int, page_size: int) -> Cache:
        """Shapes and shardings of that cache."""
        config = self.model.config
        shape = (
            config.num_layers,
            pages * self.mesh.size,
            config.num_kv_heads,
            page_size,
            config.head_dim,
        )
        sharding = NamedSharding(self.mesh, PAGES)
        pages_of: Any = jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        return Cache(pages_of, pages_of)

    def _prefill(self, weights, cache: Cache, tokens: Int[Array, "B T"], table: Int[Array, "B P"]):
        """The cache with the keys and values of these tokens, positions 0 to T-1, in the pages of
        the table; T is P whole pages. Behind a prompt's end the tokens do not matter."""
        self.traced["prefill"] += 1
        B, T = tokens.shape
        attend = resolve_attention(
            self.attention,
            target=self.target,
            dtype=self.dtype,
            head_dim=self.model.config.head_dim,
            packed=False,
            seq_len=T,
        )

        def attention(layer, cache, q, k, v):
            return attend.fn(q, k, v, None), cache.write_pages(layer, k, v, table)

        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        return self._layers(weights, cache, tokens, positions, attention)[1]

    def _decode(self, weights, cache: Cache, decoding: Decoding, *, steps: int):
        """(cache, tokens [steps, B], log-probs [steps, B]): up to `steps` tokens of each sequence,
        fewer where it ends; what stands behind its end means nothing. B: of all devices."""
        self.traced["decode"] += 1
        B, size = decoding.token.shape[0], cache.page_size

        def go_on(carry):
            i, left = carry[0], carry[4]
            running = jnp.any(left > 0)
            if self.mesh.size > 1:
                running = jax.lax.psum(running.astype(jnp.int32), EVERYWHERE) > 0
            return (i < steps) & running

        def step(carry):
            i, cache, token, position, left, drawn, tokens, logprobs = carry
            page = jnp.take_along_axis(decoding.table, position[:, None] // size, axis=1)
            page = jnp.where(left[:, None] > 0, page, NOBODYS)
            place = position[:, None] % size

            def attention(layer, cache, q, k, v):
                cache = cache.write(layer, k, v, page, place)
                keys, values = cache.read(layer, decoding.table)
                return attend_cached(q, keys, values, position), cache

            x, cache = self._layers(weights, cache, token[:, None], position[:, None], attention)
            logits = self._logits(weights, x[:, 0])
            with jax.named_scope("sample"):
                token, logprob = sample(logits, decoding.choice, drawn)
            tokens, logprobs = tokens.at[i].set(token), logprobs.at[i].set(logprob)
            ended = jnp.any(token[:, None] == decoding.stop, axis=-1)
            left = jnp.where(ended, 0, jnp.maximum(left - 1, 0))
            going = left > 0
            position = jnp.where(going, position + 1, position)
            return i + 1, cache, token, position, left, drawn + 1, tokens, logprobs

        out = jnp.zeros((steps, B), jnp.int32), jnp.zeros((steps, B), jnp.float32)
        begin = (decoding.token, decoding.position, decoding.left, decoding.drawn)
        carry = jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), cache, *begin, *out))
        found = carry[6:]
        if self.mesh.size > 1:  # all of them to every host
            found = (jax.lax.all_gather(a, EVERYWHERE, axis=1, tiled=True) for a in found)
        return carry[1], *found

    def _copy_pages(self, cache: Cache, source: Int[Array, " n"], to: Int[Array, " n"]) -> Cache:
        self.traced["copy_pages"] += 1
        return cache.copy(source, to)

    def _layers(self, weights, cache: Cache, tokens, positions, attention):
        """(x [B, T, D] behind the layers, cache). `attention(layer, cache, q, k, v) -> (out,
        cache)`."""
        B, T = tokens.shape
        with jax.named_scope("embed"):
            x = vocab.embed(
                weights["embed"], tokens.reshape(-1), axis_size=self.mesh.size, dtype=self.dtype
            )
        cos, sin = rope_tables(self.model.config, positions)
        carry = (x.reshape(B, T, -1), cache, jnp.zeros((), jnp.int32))
        for name in STACKS:
            stack = getattr(self.model, name)
            if stack is None:
                continue
            graphdef = nnx.graphdef(stack)
            # Inside the loop over layers the parameters have lost their first dimension.
            inner = jax.tree.map(lambda s: PartitionSpec(*s[1:]), self.partition[name])
            fetch = functools.partial(self._fetch, inner, self._fp32[name])

            def body(carry, layer, graphdef=graphdef, fetch=fetch):
                x, cache, i = carry
                after = []

                def attend(q, k, v, segment_ids):
                    del segment_ids
                    out, written = attention(i, cache, q, k, v)
                    after.append(written)
                    return out

                ctx = LayerContext(cos, sin, None, attend, experts=self._experts)
                x, _ = nnx.merge(graphdef, fetch(layer))(x, ctx)
                return (x, after[0], i + 1), None

            carry, _ = jax.lax.scan(body, carry, weights[name])
        return carry[0], carry[1]

    def _fetch(self, partition, fp32, layer):
        """One layer's parameters as they are used: whole, in the compute dtype."""
        shape = dict(self.mesh.shape)

        def used(p, spec, wide):
            p = p if wide else p.astype(self.dtype)
            return p if self.whole_layers else gather(p, spec, shape)

        return jax.tree.map(used, layer, partition, fp32)

    def _logits(self, weights, x):
        """fp32 [B, V] of this device's rows x [B, D]. The vocabulary is divided over the devices:
        each computes its part for the rows of all of them."""
        with jax.named_scope("head"):
            x = nnx.merge(nnx.graphdef(self.model.final_norm), weights["final_norm"])(x)
            head = weights["embed" if self.model.config.tie_embeddings else "head"]
            if self.mesh.size > 1:
                x = jax.lax.all_gather(x, EVERYWHERE, tiled=True)
            logits = jnp.einsum(
                "BD,VD->BV", x, head.astype(x.dtype), preferred_element_type=jnp.float32
            )
            if self.mesh.size > 1:
                logits = jax.lax.all_to_all(
                    logits, EVERYWHERE, split_axis=0, concat_axis=1, tiled=True
                )
            return logits

    def _expert_ops(self, grouped_matmul: str) -> ExpertOps | None:
        config = self.model.config
        if not config.num_experts:
            return None
        size = self.mesh.shape["expert"]
        exchange = make_exchange(size, self.target.backend) if size > 1 else None
        grouped = resolve_grouped_matmul(
            grouped_matmul,
            target=self.target,
            dtype=self.dtype,
            features=(config.hidden_size, config.moe_intermediate_size),
        )
        return ExpertOps(grouped, exchange)
