"""A matrix product whose weight gradient is accumulated and returned in fp32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "*T D"], w: Float[Array, "D F"]) -> Float[Array, "*T F"]:
    """`x @ w` in the dtype of x, whatever the dtype of w.

    Training gathers weights in bf16 and hands them over as fp32 *types*: the two conversions
    cancel in the compiler, and the weight's cotangent then is fp32, straight from the matrix
    unit's accumulator instead of being rounded to bf16 first.
    """
    return jnp.matmul(x, w.astype(x.dtype))


def _forward(x, w):
    return matmul(x, w), (x, w)


def _backward(residuals, dy):
    x, w = residuals
    dx = jnp.matmul(dy, w.astype(dy.dtype).T)
    rows = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(
        x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.promote_types(w.dtype, dy.dtype)
    )
    return dx, dw.astype(w.dtype)


matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def at_hand(params, x: Array):
    """(params, x), unchanged; weights that are being gathered have arrived when x is computed.

    Without it XLA's scheduler starts the gathers of a layer's last weights when their turn comes,
    instead of beside the computation of x.
    """
    low = jax.tree.map(lambda p: p.astype(x.dtype), params)
    low, x = jax.lax.optimization_barrier((low, x))
    return jax.tree.map(lambda p, like: p.astype(like.dtype), low, params), x


# The barrier stands in forward only, and gradients are not rounded.
at_hand.defvjp(lambda params, x: (at_hand(params, x), None), lambda _, cotangents: cotangents)


def cast_params(params, dtype):
    """Every floating leaf of a tree in `dtype`."""
    return jax.tree.map(functools.partial(jax.lax.convert_element_type, new_dtype=dtype), params)
