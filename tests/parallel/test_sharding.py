"""The mesh's shape, the table of axes, and moving parameters between shard and whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.models.config import ModelConfig
from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.params import specs
from jaxrl.models.transformer import Transformer
from jaxrl.parallel.mesh import AXES, make_mesh, mesh_shape
from jaxrl.parallel.sharding import (
    EVERYWHERE,
    EXPERTS,
    gather,
    param_shardings,
    param_specs,
    partition_spec,
    reduce_gradient,
    sharded_dim,
)

CONFIG = ModelConfig(
    name="wide",
    architecture="Qwen3ForCausalLM",
    vocab_size=48,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    rope_theta=1e4,
    qk_norm=True,
)


def flat(tree):
    return {tuple(k.key for k in path): v for path, v in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("devices", "expert", "context", "shape"),
    [(8, 1, 1, (8, 1, 1)), (8, 4, 2, (1, 4, 2)), (12, 3, 2, (2, 3, 2)), (1, 1, 1, (1, 1, 1))],
)
def test_mesh_shape(devices, expert, context, shape):
    assert mesh_shape(devices, expert, context) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 3}, r"expert axis 3 does not divide 8 devices; use one of \[1, 2, 4, 8\]"),
        ({"context": 16}, r"context axis 16 does not divide 8 devices; use one of \[1, 2, 4, 8\]"),
        ({"context": 0}, r"context axis 0 does not divide 8 devices"),
        ({"expert": -2}, r"expert axis -2 does not divide 8 devices"),
        ({"expert": 4, "context": 4}, r"expert axis 4 x context axis 4 does not divide 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_raises(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(8, **sizes)


def test_neighbours_share_context_then_expert():
    mesh = make_mesh(jax.devices(), expert=2, context=2)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"fsdp": 2, "expert": 2, "context": 2}
    ids = np.vectorize(lambda d: d.id)(mesh.devices)
    first = ids[0, 0, 0]
    assert (ids[0, 0, 1], ids[0, 1, 0], ids[1, 0, 0]) == (first + 1, first + 2, first + 4)


def test_partition_spec():
    assert partition_spec(("layers", "embed", "mlp")) == P(None, EVERYWHERE, None)
    assert partition_spec(("vocab", "vocab_embed")) == P(EVERYWHERE, None)
    assert partition_spec(("layers", "experts", None)) == P(None, EXPERTS, None)
    assert partition_spec((None,)) == P(None)


def test_two_dimensions_on_one_mesh_axis_raise():
    with pytest.raises(ValueError, match=r"\('embed', 'vocab'\) map twice to one mesh axis"):
        partition_spec(("embed", "vocab"))
    with pytest.raises(ValueError, match="map twice"):
        partition_spec(("a", "b"), {"a": ("expert",), "b": ("fsdp", "expert")})
    assert partition_spec(("a", "b"), {"a": None, "b": None}) == P(None, None)


def test_an_unknown_axis_raises():
    with pytest.raises(ValueError, match="logical axis 'heds' has no rule; known: layers, vocab"):
        partition_spec(("embed", "heds"))


def test_every_matrix_is_sharded_and_every_vector_whole():
    """By the dimension its product contracts; what is left whole is small."""
    model = add_lora(Transformer(CONFIG), LoraConfig(rank=8))
    sharded = flat(param_specs(model))
    assert sharded.keys() == specs(model).keys()
    for path, spec in sharded.items():
        dims = specs(model)[path].shape[1 if path[0] == "layers" else 0 :]
        assert (sharded_dim(spec) is not None) == (len(dims) == 2), path
    assert sharded["layers", "attention", "q", "kernel"] == P(None, EVERYWHERE, None)
    assert sharded["layers", "mlp", "down", "kernel"] == P(None, EVERYWHERE, None)
    assert sharded["layers", "mlp", "down", "lora_a"] == P(None, EVERYWHERE, None)
    assert sharded["layers", "mlp", "down", "lora_b"] == P(None, None, EVERYWHERE)
    assert sharded["embed",] == sharded["head",] == P(EVERYWHERE, None)
    assert flat(param_specs(model, nnx.LoRAParam)).keys() == {
        p for p in sharded if p[-1].startswith("lora")
    }


def test_param_shardings_split_what_they_say():
    mesh = make_mesh(jax.devices())
    shardings = flat(param_shardings(Transformer(CONFIG), mesh))
    down = shardings["layers", "mlp", "down", "kernel"]
    assert down == NamedSharding(mesh, P(None, EVERYWHERE, None))
    assert down.shard_shape((2, 24, 16)) == (2, 3, 16)


def test_a_mesh_that_does_not_divide_a_parameter_raises():
    model = Transformer(CONFIG.replace(intermediate_size=20))
    message = (
        r"8 devices do not divide layers.mlp.down.kernel of shape \(2, 20, 16\); "
        r"use one of \[1, 2, 4, 5\]"
    )
    with pytest.raises(ValueError, match=message):
        param_shardings(model, make_mesh(jax.devices()))
    param_shardings(model, make_mesh(jax.devices()[:4]))


SPECS = [P(EVERYWHERE, None), P(None, EVERYWHERE), P(None, None), P(EXPERTS, None)]
AXES_OF = {"fsdp": 2, "expert": 2, "context": 2}


def sharded(fn, in_specs, out_specs):
    mesh = make_mesh(jax.devices(), expert=2, context=2)
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gather_makes_a_parameter_whole(spec):
    x = jnp.arange(16.0 * 8).reshape(16, 8)
    whole = P("expert") if spec[0] == EXPERTS else P()  # experts stay with their expert group
    fn = functools.partial(gather, spec=spec, mesh_shape=AXES_OF)
    np.testing.assert_array_equal(sharded(fn, spec, whole)(x), x)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reduce_gradient_sums_devices_into_shards(spec):
    g = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, 8)), jnp.float32)
    if spec[0] == EXPERTS:  # a device has gradients of its expert group's half only
        half = np.arange(16)[None, :, None] // 8 == (np.arange(8) // 2 % 2)[:, None, None]
        total, g = (
            jnp.sum(g * half, axis=0),
            g[np.arange(8)[:, None], (np.arange(8) // 2 % 2)[:, None] * 8 + np.arange(8)],
        )
    else:
        total = jnp.sum(g, axis=0)
    fn = lambda g: reduce_gradient(g[0], spec, AXES_OF)  # noqa: E731
    np.testing.assert_allclose(sharded(fn, P(EVERYWHERE), spec)(g), total, rtol=1e-5, atol=1e-6)


def test_one_device_needs_no_collective():
    x = jnp.ones((4, 2))
    one = dict.fromkeys(AXES_OF, 1)
    assert gather(x, P(EVERYWHERE, None), one) is x
    assert reduce_gradient(x, P(None, None), one) is x
