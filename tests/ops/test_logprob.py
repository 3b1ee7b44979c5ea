"""Log-probability and entropy against plain log-softmax; split vocabulary; no [T, V] array."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl.ops.logprob import token_logprob
from jaxrl.ops.tokenwise import pull_back, tokenwise, values_of_first
from jaxrl.parallel.mesh import make_mesh
from jaxrl.perf.hlo import summarize

T, D, V = 16, 12, 40


@functools.cache
def inputs(dtype="float32"):
    """x, w, targets (both ends of the vocabulary among them), cotangents of both results."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((T, D)), rng.standard_normal((V, D))
    targets = rng.integers(0, V, T)
    targets[:2] = 0, V - 1
    dy = tuple(jnp.asarray(a, jnp.float32) for a in rng.standard_normal((2, T)))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(targets), dy


def plain(x, w, targets, temperature):
    logp = jax.nn.log_softmax(x @ w.T / temperature)
    logprob = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    return logprob, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@functools.cache
def expected(temperature, dtype="float32"):
    """The plain (results, dx, dw) in fp32, of inputs rounded to `dtype`."""
    x, w, targets, dy = inputs(dtype)
    w = w.astype(dtype).astype(jnp.float32)
    fn = lambda x, w: plain(x, w, targets, temperature)  # noqa: E731

    @jax.jit
    def run(x, w):
        y, vjp = jax.vjp(fn, x, w)
        return y, *vjp(dy)

    return run(x.astype(jnp.float32), w)


def value_and_gradients(x, w, targets, dy, *, temperature=1.0, axis=None):
    y, vjp = jax.vjp(lambda x, w: token_logprob(x, w, targets, temperature, axis), x, w)
    return y, *vjp(dy)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        error = np.max(np.abs(np.asarray(x, np.float32) - y))
        assert error < tolerance * np.max(np.abs(y))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax(temperature):
    run = jax.jit(functools.partial(value_and_gradients, temperature=temperature))
    close(run(*inputs()), expected(temperature))


def test_bf16_rounds_only_its_factors():
    """Logits, sums and the head's gradient are fp32; what is multiplied is bf16."""
    (logprob, entropy), dx, dw = jax.jit(value_and_gradients)(*inputs("bfloat16"))
    assert {a.dtype.name for a in (logprob, entropy, dw)} == {"float32"}
    assert dx.dtype == jnp.bfloat16
    values, *gradients = expected(1.0, "bfloat16")
    close((logprob, entropy), values)
    close((dx, dw), gradients, 2**-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_split_vocabulary_equals_a_whole_one(temperature):
    run = functools.partial(value_and_gradients, temperature=temperature, axis="fsdp")
    split = P("fsdp")
    sharded = jax.shard_map(
        run, mesh=make_mesh(jax.devices()), in_specs=split, out_specs=split, check_vma=False
    )
    close(jax.jit(sharded)(*inputs()), expected(temperature))


def test_large_logits_stay_finite():
    x, w, targets, dy = inputs()
    (logprob, entropy), dx, dw = jax.jit(value_and_gradients)(1e4 * x, w, targets, dy)
    assert all(np.all(np.isfinite(a)) for a in (logprob, entropy, dx, dw))
    assert np.min(logprob) < -1e3 and np.all(np.abs(entropy) < 4)


@pytest.mark.parametrize(("used", "computed"), [(0, 0), (1, 1), (4, 1), (5, 2), (T, 4)])
def test_only_chunks_of_the_first_tokens_are_computed(used, computed):
    x, w, targets, dy = inputs()
    seen = []

    def logprobs(w, frozen, x):
        jax.debug.callback(lambda: seen.append(1))
        return token_logprob(x[0], w, x[1])

    first = jnp.arange(T) < used
    dy = tuple(jnp.where(first, a, 0) for a in dy)
    y, vjp = jax.vjp(lambda w, x: token_logprob(x, w, targets), w, x)
    dw, dx = vjp(dy)
    zeros, options = jnp.zeros_like(w), {"chunk": 4, "used": jnp.asarray(used)}
    found = pull_back(logprobs, w, {}, (x, targets), dy, zeros, **options)
    values = values_of_first(logprobs, w, {}, (x, targets), **options)
    jax.effects_barrier()
    assert len(seen) == 2 * computed
    for a, b in ((found[0], dw), (found[1][0], dx)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for some in (found[2], values):
        for a, b in zip(some, y, strict=True):
            np.testing.assert_allclose(a[: 4 * computed], b[: 4 * computed], rtol=1e-5)
            assert not np.any(a[4 * computed :])


@pytest.mark.parametrize("through", ["tokenwise", "pull_back"])
def test_all_logits_are_never_held(through):
    tokens, rows = 64, 96

    def logprobs(w, frozen, x):
        return token_logprob(x[0], w, x[1])

    def run(w, x, targets, dy, chunk):
        inputs = (x, targets)
        if through == "pull_back":
            return pull_back(logprobs, w, {}, inputs, (dy, dy), jnp.zeros_like(w), chunk=chunk)
        y, vjp = jax.vjp(lambda w, x: tokenwise(logprobs, w, {}, (x, targets), chunk=chunk), w, x)
        return y, vjp((dy, dy))

    def largest(chunk):
        compiled = (
            jax.jit(run, static_argnums=4)
            .lower(
                *(jnp.ones(s) for s in ((rows, D), (tokens, D))),
                jnp.ones(tokens, int),
                jnp.ones(tokens),
                chunk,
            )
            .compile()
        )
        arrays = summarize(compiled.as_text()).largest_arrays
        return max(math.prod(a.dims) for a in arrays)

    assert largest(0) >= tokens * rows
    assert largest(16) <= 16 * rows
