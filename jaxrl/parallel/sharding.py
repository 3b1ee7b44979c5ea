"""One table from logical parameter axes to mesh axes, and the shardings that follow from it."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.models.params import ParamSpec, nest, specs

RULES: Mapping[str, str | None] = {
    # A matrix lies on fsdp with the dimension its product contracts, the first one: gathering and
    # scattering along the first dimension needs no transposed copy.
    "layers": None,
    "vocab": "fsdp",
    "vocab_embed": None,
    "embed": "fsdp",
    "heads": None,
    "kv_heads": None,
    "attention_out": "fsdp",
    "mlp": None,
    "mlp_hidden": "fsdp",
    "residual": None,
    "lora": "fsdp",
}


def partition_spec(axes: tuple[str | None, ...], rules: Mapping = RULES) -> PartitionSpec:
    """The mesh axis of each dimension. Two dimensions on one mesh axis are a `ValueError`."""
    mapped = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no rule; known: {', '.join(rules)}")
        mapped.append(None if axis is None else rules[axis])
    used = [m for m in mapped if m is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} map twice to one mesh axis: {tuple(mapped)}")
    return PartitionSpec(*mapped)


def check_divides(path: tuple[str, ...], spec: ParamSpec, mesh: Mesh) -> None:
    """Refuse a mesh whose axes do not divide a parameter, naming sizes that would."""
    for size, axis in zip(spec.shape, partition_spec(spec.axes), strict=True):
        if axis is not None and size % mesh.shape[axis]:
            fits = [d for d in range(1, mesh.shape[axis] + 1) if size % d == 0]
            raise ValueError(
                f"{axis} axis {mesh.shape[axis]} does not divide {'.'.join(path)} of shape "
                f"{spec.shape}; use one of {fits}"
            )


def param_specs(model: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> dict:
    """Nested dict of `PartitionSpec`s of the variables of exactly this `kind` (default: all)."""
    return nest({p: partition_spec(s.axes) for p, s in specs(model, kind).items()})


def param_shardings(model: nnx.Module, mesh: Mesh, kind: type[nnx.Variable] = nnx.Variable) -> dict:
    """Nested dict of `NamedSharding`s on `mesh`, checked to divide."""
    flat = specs(model, kind)
    for path, spec in flat.items():
        check_divides(path, spec, mesh)
    return nest({p: NamedSharding(mesh, partition_spec(s.axes)) for p, s in flat.items()})


def sharded_dim(spec: PartitionSpec) -> int | None:
    """Which dimension lies on the fsdp axis."""
    return next((i for i, axis in enumerate(spec) if axis == "fsdp"), None)


def gather(x: jax.Array, spec: PartitionSpec, axis_size: int) -> jax.Array:
    """Inside shard_map: the whole of a parameter whose shard is x."""
    dim = sharded_dim(spec)
    if dim is None or axis_size == 1:
        return x
    return jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)


def reduce_gradient(g: jax.Array, spec: PartitionSpec, axis_size: int) -> jax.Array:
    """Inside shard_map: this device's shard of the gradient summed over devices."""
    if axis_size == 1:
        return g
    dim = sharded_dim(spec)
    if dim is None:
        return jax.lax.psum(g, "fsdp")
    return jax.lax.psum_scatter(g, "fsdp", scatter_dimension=dim, tiled=True)
