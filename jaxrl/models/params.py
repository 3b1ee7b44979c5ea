"""One declaration per parameter: shape, logical axes, initialiser and Hugging Face name.

A module declares its parameters with `declare`; the abstract tree, initialisation, shardings, the
checkpoint name map and memory estimates are all read back from those declarations with `specs`.
Nothing is allocated until `initialize` (or a checkpoint) fills them in.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

type Path = tuple[str, ...]


class Buffer(nnx.Variable):
    """A value that belongs to the model, and that no gradient changes."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes (one name per dimension), initialiser and HF tensor name of a parameter.

    `hf` may hold `{i}`, the layer number, which counts from `first_layer`; such a parameter is
    stacked over layers along dimension 0. It may hold `{e}`, the number of an expert; experts are
    stacked along the next dimension. `hf_transposed` says that the file holds the last two
    dimensions swapped ([out, in]). `hf` None: not part of a checkpoint of the base model (LoRA).
    `fp32`: held and used in fp32, whatever the dtype of the others (the router).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str
    hf: str | None
    hf_transposed: bool
    kind: type[nnx.Variable]
    first_layer: int = 0
    fp32: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dtype(self, others):
        """The dtype it is held in where the others are held in `others`."""
        return jnp.dtype(jnp.float32 if self.fp32 else others)


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where a module's parameters live: under which HF prefix, and how many stacked layers, the
    first of which is the checkpoint's layer `first_layer`."""

    hf: str = ""
    layers: int | None = None
    first_layer: int = 0

    def child(self, hf: str) -> "Scope":
        return dataclasses.replace(self, hf=self.hf + hf)

    def declare(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        init: str = "normal",
        hf: str | None = None,
        hf_transposed: bool = False,
        kind: type[nnx.Variable] = nnx.Param,
        fp32: bool = False,
    ) -> nnx.Variable:
        """An abstract fp32 variable carrying its own declaration."""
        if len(shape) != len(axes):
            raise ValueError(f"shape {shape} and axes {axes} differ in length")
        if self.layers is not None:
            shape, axes = (self.layers, *shape), ("layers", *axes)
        name = None if hf is None else self.hf + hf
        spec = ParamSpec(
            shape, axes, init, name, hf_transposed, kind, first_layer=self.first_layer, fp32=fp32
        )
        return kind(jax.ShapeDtypeStruct(shape, jnp.float32), spec=spec)


def specs(module: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> dict[Path, ParamSpec]:
    """The declarations of every variable of exactly this `kind` (default: all), by path."""
    return {
        tuple(map(str, path)): variable.get_metadata()["spec"]
        for path, variable in nnx.to_flat_state(nnx.state(module))
        if kind is nnx.Variable or type(variable) is kind
    }


def nest[T](flat: Mapping[Path, T]) -> dict:
    """{("a", "b"): x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def initial_value(
    path: Path, spec: ParamSpec, key: jax.Array, dtype=jnp.float32, *, in_turns: bool = False
) -> jax.Array:
    """One parameter's initial value; its random stream depends on `key` and its path only.

    in_turns: a large array's rows are drawn 64 at a time, which needs a third of the memory and
    half of the time on one device, but would make a loop over a sharded dimension. The values are
    the same, to rounding.
    """
    # crc32 rather than hash(): the same stream in every process.
    key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    match spec.init:
        case "ones":
            return jnp.ones(spec.shape, dtype)
        case "zeros":
            return jnp.zeros(spec.shape, dtype)
        case "normal":
            *lead, last = spec.shape
            keys = jax.random.split(key, math.prod(lead))

            def row(key):
                return (0.02 * jax.random.normal(key, (last,), jnp.float32)).astype(dtype)

            rows = jax.lax.map(row, keys, batch_size=64) if in_turns else jax.vmap(row)(keys)
            return rows.reshape(spec.shape)
        case "kaiming_uniform":
            # Bound of torch's kaiming_uniform_(a=sqrt(5)), PEFT's choice for LoRA's A.
            bound = 1.0 / math.sqrt(spec.shape[-2])
            return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound).astype(dtype)
    raise ValueError(f"{'/'.join(path)}: unknown initialiser {spec.init!r}")
