"""Attention over a part of the keys, with its log-sum-exp: how parts become the whole."""

import jax.numpy as jnp


def merge(out, lse, new_out, new_lse):
    """(out, lse) over both sets of keys: out [B, T, N, H] and lse [B, N, T], fp32.

    Where a query sees none of the new keys, its new lse is -1e30 or less, its new out anything.
    """
    total = jnp.logaddexp(lse, new_lse)
    old, new = (jnp.swapaxes(jnp.exp(a - total), 1, 2)[..., None] for a in (lse, new_lse))
    return out * old + jnp.where(new > 0, new_out * new, 0.0), total


def delta(dout, out):
    """sum(dout * out) of each query and head, fp32 [B, N, T]; both [B, T, N, H]."""
    products = dout.astype(jnp.float32) * out.astype(jnp.float32)
    return jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2)
