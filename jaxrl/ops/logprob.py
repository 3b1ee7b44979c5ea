"""Log-probability and entropy of target tokens, from hidden states, without a [T, V] array.

`token_logprob` works on one chunk of tokens; `jaxrl.ops.tokenwise` calls it chunk by chunk. With
`axis_name` the vocabulary is split over that mesh axis, or axes: every device scores all devices'
tokens of the chunk against its own V/n rows, and the partial sums meet in small reductions.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logprob(
    x: Float[Array, "T D"],
    w: Float[Array, "v D"],
    targets: Int[Array, " T"],
    temperature: float = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """(log p(target), entropy) of softmax(x w^T / temperature), fp32.

    w: the head, [V, D], or this device's rows of it. Gradients flow from both results into x and
    w; that of w is fp32 where w is.
    """
    return _forward(x, w, targets, temperature, axis_name)[0]


def _forward(x, w, targets, temperature, axis_name):
    own = x.shape[0]
    if axis_name is not None:
        x = jax.lax.all_gather(x, axis_name, tiled=True)
        targets = jax.lax.all_gather(targets, axis_name, tiled=True)
        targets = targets - jax.lax.axis_index(axis_name) * w.shape[0]
    psum = functools.partial(jax.lax.psum, axis_name=axis_name) if axis_name else lambda a: a
    logits = jax.lax.dot_general(
        x, w.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if temperature != 1.0:
        logits = logits / temperature
    top = jnp.max(logits, axis=-1)
    if axis_name:
        top = jax.lax.pmax(top, axis_name)
    # Sums of e^z and e^z z with z = logit - max give log-sum-exp and entropy in one pass.
    z = logits - top[:, None]
    e = jnp.exp(z)
    total, weighted = psum(jnp.sum(e, axis=-1)), psum(jnp.sum(e * z, axis=-1))
    here = (targets >= 0) & (targets < w.shape[0])
    picked = jnp.take_along_axis(z, jnp.where(here, targets, 0)[:, None], axis=-1)[:, 0]
    picked = psum(jnp.where(here, picked, 0.0))
    log_total = jnp.log(total)
    logprob, entropy = picked - log_total, log_total - weighted / total
    residuals = (x, w, targets, logits, top + log_total, entropy)
    if axis_name is not None:
        start = jax.lax.axis_index(axis_name) * own
        logprob, entropy = (jax.lax.dynamic_slice_in_dim(a, start, own) for a in (logprob, entropy))
    return (logprob, entropy), residuals


def _backward(temperature, axis_name, residuals, cotangents):
    x, w, targets, logits, lse, entropy = residuals
    g_logprob, g_entropy = cotangents
    if axis_name is not None:
        g_logprob, g_entropy = (
            jax.lax.all_gather(g, axis_name, tiled=True) for g in (g_logprob, g_entropy)
        )
    # d logprob / d logit = onehot - p;   d entropy / d logit = -p (log p + entropy).
    logp = logits - lse[:, None]
    onehot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    dlogits = jnp.where(onehot, g_logprob[:, None], 0.0) - jnp.exp(logp) * (
        g_logprob[:, None] + g_entropy[:, None] * (logp + entropy[:, None])
    )
    dlogits = (dlogits / temperature).astype(x.dtype)
    wide = jnp.promote_types(w.dtype, x.dtype)
    dw = jax.lax.dot_general(dlogits, x, (((0,), (0,)), ((), ())), preferred_element_type=wide)
    if axis_name is None:
        dx = jnp.matmul(dlogits, w.astype(x.dtype))
    else:
        dx = jnp.matmul(dlogits, w.astype(x.dtype), preferred_element_type=jnp.float32)
        dx = jax.lax.psum_scatter(dx, axis_name, scatter_dimension=0, tiled=True)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


token_logprob.defvjp(_forward, _backward)
