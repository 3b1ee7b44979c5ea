"""What of a GPU's memory an engine takes where its options leave that open.

On a CPU nothing is limited, and layers are drawn with as the trainer divides them.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl.models.params import specs
from jaxrl.models.transformer import Transformer
from jaxrl.options import ConfigError
from jaxrl.parallel.sharding import partition_spec, undivided
from jaxrl.perf.hardware import GPUS, GiB
from jaxrl.rollout.engine import EngineLimits
from jaxrl.rollout.programs import STACKS, Programs

# Of a GPU's memory: for layers that each device holds whole, at most, and for the cache of an
# engine whose devices train, too; with the training step's own needs both fit beside each other.
WHOLE_SHARE, CACHE_SHARE = 0.25, 0.4
# Of what a server's weights leave; the rest is for what its programs compute with.
SERVED_SHARE = 0.85

type Held = Literal["auto", "divided", "whole"]


def pool_bytes(device: Any) -> int | None:
    """Bytes that programs can have of a GPU, real or compile-only; None of a CPU, and of a GPU that
    does not say."""
    if device.platform == "cpu":
        return None
    known = next((g for g in GPUS.values() if device.device_kind in g.device_kinds), None)
    if known is not None:
        return round(known.pool_gib * GiB)
    return (device.memory_stats() or {}).get("bytes_limit")


def holds_whole_layers(held: Held, model: Transformer, mesh: Mesh, dtype) -> bool:
    """Whether each device is to hold the layers whole (of experts its part of the expert axis):
    `auto` says so of GPUs where that takes no more than `WHOLE_SHARE` of the memory."""
    if held != "auto":
        return held == "whole"
    pool = pool_bytes(mesh.devices.flat[0])
    return pool is not None and whole_layers_bytes(model, mesh, dtype) <= WHOLE_SHARE * pool


def whole_layers_bytes(model: Transformer, mesh: Mesh, dtype) -> int:
    """Of the layers, on each device that holds them whole."""
    total = 0
    for path, spec in specs(model).items():
        if path[0] in STACKS:
            parts = mesh.shape["expert"] if "expert" in undivided(partition_spec(spec.axes)) else 1
            total += spec.size // parts * (4 if spec.fp32 else jnp.dtype(dtype).itemsize)
    return total


def token_bytes(programs: Programs) -> int:
    """Of one token's keys and values."""
    config = programs.model.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * programs.dtype.itemsize


def trainers_limits(limits: EngineLimits, programs: Programs) -> EngineLimits:
    """Those of an engine on the devices that train. Raises ConfigError as `fitting`."""
    pool = pool_bytes(programs.mesh.devices.flat[0])
    return limits if pool is None else fitting(limits, programs, round(CACHE_SHARE * pool))


def servers_limits(limits: EngineLimits, programs: Programs, weights: Any) -> EngineLimits:
    """Those of a server's engine, with its weights. Raises ConfigError as `fitting`."""
    pool = pool_bytes(programs.mesh.devices.flat[0])
    if pool is None:
        return limits
    held = sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(weights)
    )
    return fitting(limits, programs, round(SERVED_SHARE * (pool - held)))


def fitting(limits: EngineLimits, programs: Programs, most: int) -> EngineLimits:
    """`limits`, with a cache of at most `most` bytes unless they name its size. Raises ConfigError
    where not one sequence of `max_len` finds room in it."""
    if limits.cache_tokens:
        return limits
    each = token_bytes(programs)
    tokens = most // each // limits.page * limits.page
    if tokens >= limits.slots * limits.max_len:
        return limits
    if tokens < limits.max_len:
        raise ConfigError(
            f"the cache of one sequence of {limits.max_len:,} tokens takes "
            f"{limits.max_len * each / GiB:.1f} GiB, and each device has {most / GiB:.1f} for "
            "it; use shorter sequences, or name a size (cache_tokens) to try all the same"
        )
    return dataclasses.replace(limits, cache_tokens=tokens)
