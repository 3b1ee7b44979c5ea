"""Results of attention do not depend on its tiles: sides that differ, either way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels import tiles
from jaxrl_kernels.flash_attention import reference, triton
from jaxrl_kernels.launch import interpreted


@pytest.mark.parametrize(
    ("documents", "causal"), [((30, 50, 10, 1), True), ((30, 50, 10, 1), False), ((91,), True)]
)
@pytest.mark.parametrize("sides", [(16, 64), (64, 16)])
def test_sides_that_differ(monkeypatch, sides, documents, causal):
    monkeypatch.setattr(tiles, "attention", lambda *_: tiles.Tile(*sides, 4, 1))
    T = sum(documents)
    ids = jnp.repeat(jnp.arange(len(documents)), np.array(documents))[None]
    rng = np.random.default_rng(0)
    heads = (2, 1, 1, 2)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((1, T, n, 16)), "float32") for n in heads)

    def run(attend):
        options = {"segment_ids": ids if len(documents) > 1 else None, "causal": causal}
        out, vjp = jax.vjp(lambda *qkv: attend(*qkv, **options), q, k, v)
        return out, *vjp(dout)

    with interpreted():
        got = jax.jit(run, static_argnums=0)(triton.flash_attention)
    want = jax.jit(run, static_argnums=0)(reference.flash_attention)
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)
