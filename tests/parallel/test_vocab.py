"""Embedding and its gradient with the table split over eight devices against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl.parallel import vocab
from jaxrl.parallel.mesh import make_mesh
from jaxrl.perf.hlo import summarize

V, D, T = 40, 6, 48  # six tokens per device


@functools.cache
def inputs():
    """table, tokens (repeated ones, every shard's first and last), dx, an accumulator."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, T)
    tokens[: 2 * 8] = np.sort(np.concatenate([np.arange(0, V, 5), np.arange(4, V, 5)]))
    tokens[30:38] = 7
    rng.shuffle(tokens)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return normal(V, D), jnp.asarray(tokens), normal(T, D), normal(V, D)


def eight(fn, args):
    """fn, compiled for shards of its arguments and results along their first axis."""
    split = jax.shard_map(
        fn, mesh=make_mesh(jax.devices()), in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False
    )
    return jax.jit(split).lower(*args).compile()


@pytest.mark.parametrize("chunk", [2, 4, 1024])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embed(chunk, dtype):
    table, tokens, *_ = inputs()
    expected = np.asarray(table.astype(dtype))[np.asarray(tokens)]
    one = vocab.embed(table, tokens, axis_size=1, dtype=dtype, chunk=chunk)
    fn = functools.partial(vocab.embed, axis_size=8, dtype=dtype, chunk=chunk)
    for got in (one, eight(fn, (table, tokens))(table, tokens)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("chunk", [2, 4, 1024])
def test_the_gradient_is_added(chunk):
    _, tokens, dx, grad = inputs()
    expected = np.asarray(grad, np.float64)
    np.add.at(expected, np.asarray(tokens), np.asarray(dx, np.float64))
    one = vocab.add_embed_gradient(grad, tokens, dx, axis_size=1, chunk=chunk)
    fn = functools.partial(vocab.add_embed_gradient, axis_size=8, chunk=chunk)
    for got in (one, eight(fn, (grad, tokens, dx))(grad, tokens, dx)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_bf16_cotangents_add_up_in_fp32(devices):
    grad, tokens = jnp.zeros((8, 1)), jnp.zeros(512, int)
    dx = jnp.full((512, 1), 1 / 3, jnp.bfloat16)
    fn = functools.partial(vocab.add_embed_gradient, axis_size=devices)
    total = (fn if devices == 1 else eight(fn, (grad, tokens, dx)))(grad, tokens, dx)
    np.testing.assert_allclose(total[0, 0], 512 * float(dx[0, 0]), rtol=1e-6)
    assert not np.any(total[1:])


def test_no_device_holds_the_table():
    rows, tokens = 1024, jnp.zeros(64, int)
    table, dx = jnp.zeros((rows, D)), jnp.zeros((64, D))
    lookup = functools.partial(vocab.embed, axis_size=8, dtype=jnp.float32)
    add = functools.partial(vocab.add_embed_gradient, axis_size=8)
    for compiled in (eight(lookup, (table, tokens)), eight(add, (table, tokens, dx))):
        largest = summarize(compiled.as_text()).largest_arrays[0]
        assert largest.dims == (rows // 8, D)


@pytest.mark.parametrize(("tokens", "n"), [(8, 2), (9, 3), (3, 1), (7, 1), (11, 11), (64, 16)])
def test_chunks_are_equal(tokens, n):
    assert vocab._chunks(tokens, 4) == n
