"""Apply a token-wise function in chunks of tokens, so that its intermediates have a chunk's size.

fn(trainable, frozen, x) -> y: x and y are pytrees of arrays whose first axis is tokens, and fn
treats tokens one by one. `frozen` gets no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl.ops.linear import cast_params

type TokenFn = Callable


def values_of_first(fn: TokenFn, trainable, frozen, x, *, used: Int[Array, ""], chunk: int) -> Any:
    """`fn(trainable, frozen, x)` of the first `used` tokens, and zeros for the others: chunks that
    have none of the first cost nothing. Not differentiable; see `pull_back`."""
    tokens = jax.tree.leaves(x)[0].shape[0]
    parts = _split(x, min(chunk, tokens) if chunk > 0 else tokens)
    low = cast_params(trainable, _compute_dtype(x))

    def body(i, y):
        return _put(y, i, fn(low, frozen, _at(parts, i)))

    one = jax.eval_shape(fn, low, frozen, _at(parts, 0))
    return _join(jax.lax.fori_loop(0, _chunks(used, parts), body, _room(parts, one)), tokens)


def tokenwise(fn: TokenFn, trainable, frozen, x, *, chunk: int, dtype=None) -> Any:
    """`fn(trainable, frozen, x)`, evaluated `chunk` tokens at a time; differentiable.

    Backward recomputes each chunk's intermediates, so at most one chunk's worth is ever alive, and
    accumulates the gradient of `trainable` in fp32. With `chunk` 0, or at least T, fn is called
    once, plainly. A last partial chunk is padded with zeros. Chunks see the values of `trainable`
    in `dtype` (default: that of x).
    """
    tokens = jax.tree.leaves(x)[0].shape[0]
    if chunk <= 0 or chunk >= tokens:
        return fn(trainable, jax.lax.stop_gradient(frozen), x)
    return _chunked(fn, chunk, dtype, trainable, frozen, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(fn, chunk, dtype, trainable, frozen, x):
    tokens = jax.tree.leaves(x)[0].shape[0]
    low = cast_params(trainable, dtype or _compute_dtype(x))
    y = jax.lax.map(lambda x: fn(low, frozen, x), _split(x, chunk))
    return _join(y, tokens)


def _chunked_forward(fn, chunk, dtype, trainable, frozen, x):
    return _chunked(fn, chunk, dtype, trainable, frozen, x), (trainable, frozen, x)


def _chunked_backward(fn, chunk, dtype, residuals, dy):
    trainable, frozen, x = residuals
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), trainable)
    grads, dx, _ = pull_back(fn, trainable, frozen, x, dy, zeros, chunk=chunk, dtype=dtype)
    # None: no cotangent.
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trainable), None, dx


_chunked.defvjp(_chunked_forward, _chunked_backward)


def pull_back(
    fn: TokenFn, trainable, frozen, x, dy, grads, *, chunk: int, dtype=None, used=None
) -> tuple[Any, Any, Any]:
    """Chunk by chunk: y, and its cotangent dy pulled back to `trainable` and x.

    used: number of the first tokens; y and dx of the others are zeros, and chunks that have none of
    the first cost nothing. None: all.

    Returns (grads + d trainable, dx, y). grads: fp32 arrays like `trainable`, updated in place.
    Integer leaves of x (token ids) get None in dx. One pass: the forward of a chunk serves both
    its value and its gradient, which is what makes a loss whose weights are known beforehand
    (SFT) cheaper than one that needs all values first (RL).
    """
    tokens = jax.tree.leaves(x)[0].shape[0]
    chunk = min(chunk, tokens) if chunk > 0 else tokens
    # Weights enter the loop in the compute dtype and are fp32 inside only as a type, for the sake
    # of their cotangent (see `matmul`): no fp32 copy of them is ever made.
    low = cast_params(trainable, dtype or _compute_dtype(x))

    def body(grads, x_dy):
        x, dy = x_dy
        leaves, treedef = jax.tree.flatten(x)
        is_float = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]

        def of_floats(trainable, floats):
            floats = iter(floats)
            merged = [next(floats) if f else a for f, a in zip(is_float, leaves, strict=True)]
            return fn(trainable, frozen, treedef.unflatten(merged))

        floats = [a for f, a in zip(is_float, leaves, strict=True) if f]
        y, vjp = jax.vjp(of_floats, cast_params(low, jnp.float32), floats)
        dtrainable, dfloats = vjp(dy)
        dfloats = iter(dfloats)
        dx = treedef.unflatten([next(dfloats) if f else None for f in is_float])
        grads = jax.tree.map(jnp.add, grads, cast_params(dtrainable, jnp.float32))
        return grads, (dx, y)

    if used is not None:
        parts = _split((x, dy), chunk)

        def step(i, carry):
            grads, found = body(carry[0], _at(parts, i))
            return grads, _put(carry[1], i, found)

        one = jax.eval_shape(lambda: body(grads, _at(parts, 0))[1])
        start = (grads, _room(parts, one))
        grads, (dx, y) = jax.lax.fori_loop(0, _chunks(used, parts), step, start)
        return grads, _join(dx, tokens), _join(y, tokens)
    if chunk == tokens:
        grads, (dx, y) = body(grads, (x, dy))
        return grads, dx, y
    grads, (dx, y) = jax.lax.scan(body, grads, (_split(x, chunk), _split(dy, chunk)))
    return grads, _join(dx, tokens), _join(y, tokens)


def _compute_dtype(x):
    return next(a.dtype for a in jax.tree.leaves(x) if jnp.issubdtype(a.dtype, jnp.inexact))


# Of trees of arrays [chunks, chunk, ...]:


def _chunks(used, parts):
    """The number of chunks that hold the first `used` tokens."""
    chunk = jax.tree.leaves(parts)[0].shape[1]
    return (used + chunk - 1) // chunk


def _at(parts, i):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), parts)


def _put(parts, i, one):
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda a, b: put(a, b, i, 0), parts, one)


def _room(parts, one):
    """Zeros for what each chunk gives, of which `one` is a chunk's."""
    count = jax.tree.leaves(parts)[0].shape[0]
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), one)


def _split(tree, chunk: int):
    def split(a):
        pad = -a.shape[0] % chunk
        if pad:
            a = jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, chunk, *a.shape[1:])  # [T, ...] -> [chunks, chunk, ...]

    return jax.tree.map(split, tree)


def _join(tree, tokens: int):
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], tree)
