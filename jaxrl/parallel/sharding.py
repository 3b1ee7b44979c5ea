"""One table from logical parameter axes to mesh axes, and the shardings that follow from it."""

import math
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.models.params import ParamSpec, nest, specs
from jaxrl.options import ConfigError

type MeshAxes = tuple[str, ...]

# Over all devices: whatever else an axis does, it also divides the parameters.
EVERYWHERE: MeshAxes = ("fsdp", "expert", "context")
# Experts lie on the expert axis, where they stay, and what each device of it holds on the others.
EXPERTS: MeshAxes = ("expert", "fsdp", "context")

RULES: Mapping[str, MeshAxes | None] = {
    # A matrix is divided along the dimension its product contracts, the first one: gathering and
    # scattering along the first dimension needs no transposed copy.
    "layers": None,
    "vocab": EVERYWHERE,
    "vocab_embed": None,
    "embed": EVERYWHERE,
    "heads": None,
    "kv_heads": None,
    "attention_out": EVERYWHERE,
    "mlp": None,
    "mlp_hidden": EVERYWHERE,
    "residual": None,
    "lora": EVERYWHERE,
    "experts": EXPERTS,
}


def partition_spec(axes: tuple[str | None, ...], rules: Mapping = RULES) -> PartitionSpec:
    """The mesh axes of each dimension. Two dimensions on one mesh axis are a `ValueError`."""
    mapped = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no rule; known: {', '.join(rules)}")
        mapped.append(None if axis is None else rules[axis])
    used = [axis for m in mapped if m is not None for axis in m]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} map twice to one mesh axis: {tuple(mapped)}")
    return PartitionSpec(*mapped)


def check_divides(path: tuple[str, ...], spec: ParamSpec, mesh: Mesh) -> None:
    """Refuse (ConfigError) a mesh whose axes do not divide a parameter, naming sizes that would."""
    for size, axes in zip(spec.shape, partition_spec(spec.axes), strict=True):
        parts = math.prod(mesh.shape[axis] for axis in axes or ())
        if size % parts:
            fits = [d for d in range(1, parts + 1) if size % d == 0]
            raise ConfigError(
                f"{parts} devices do not divide {'.'.join(path)} of shape {spec.shape}; use one of "
                f"{fits}"
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


def undivided(spec: PartitionSpec) -> PartitionSpec:
    """Of the same parameter as devices use it: whole, but experts stay on the expert axis."""
    return PartitionSpec(*(EXPERTS[0] if axes == EXPERTS else None for axes in spec))


def sharded_dim(spec: PartitionSpec) -> int | None:
    """Which dimension is divided over devices."""
    return next((i for i, axes in enumerate(spec) if axes is not None), None)


def gathered_axes(spec: PartitionSpec, mesh_shape: Mapping[str, int]) -> MeshAxes:
    """The mesh axes over which a parameter is gathered for its use, those of size 1 left out: all
    that divide it, but experts stay on the expert axis."""
    dim = sharded_dim(spec)
    if dim is None:
        return ()
    axes = EXPERTS[1:] if spec[dim] == EXPERTS else EVERYWHERE
    return tuple(axis for axis in axes if mesh_shape[axis] > 1)


def gather(x: jax.Array, spec: PartitionSpec, mesh_shape: Mapping[str, int]) -> jax.Array:
    """Inside shard_map: what this device uses of a parameter whose shard is x."""
    dim, axes = sharded_dim(spec), gathered_axes(spec, mesh_shape)
    return x if dim is None or not axes else jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def reduce_gradient(g: jax.Array, spec: PartitionSpec, mesh_shape: Mapping[str, int]) -> jax.Array:
    """Inside shard_map: this device's shard of the sum over devices of what `gather` gave's
    gradient. A parameter that is not divided is summed over all devices."""
    if (dim := sharded_dim(spec)) is None:
        axes = tuple(axis for axis in EVERYWHERE if mesh_shape[axis] > 1)
        return jax.lax.psum(g, axes) if axes else g
    axes = gathered_axes(spec, mesh_shape)
    return jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True) if axes else g
