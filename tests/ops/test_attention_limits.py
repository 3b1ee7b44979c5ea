"""What attention takes at its limits, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels.flash_attention import triton
from jaxrl_kernels.flash_attention.reference import flash_attention as plain
from jaxrl_kernels.launch import interpreted

from jaxrl.ops.attention import ATTENTION, flash_attention
from jaxrl.ops.attention_xla import blocked_attention

Q = jnp.zeros((1, 8, 2, 16))


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "message"),
    [
        (*[Q.astype(jnp.int32)] * 3, None, "q is int32: want one of bfloat16, float16, float32"),
        (Q, Q, Q, 0.0, r"scale 0\.0 is not above 0"),
        (*[jnp.zeros((1, 8, 2, 257))] * 3, None, "head_dim 257 is above 256"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(q, k, v, scale, message):
    with interpreted(), pytest.raises(ValueError, match=message):
        triton.flash_attention(q, k, v, scale=scale)


AGREE = "B, T and H must agree, and K divide N"


@pytest.mark.parametrize(
    ("k", "message"),
    [
        ((1, 8, 3, 16), AGREE),
        ((1, 8, 2, 8), AGREE),
        ((1, 9, 2, 16), AGREE),
        ((2, 8, 2, 16), AGREE),
        ((8, 2, 16), r"\(8, 2, 16\): want \[B, T, N, H\] and twice \[B, T, K, H\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_all(k, message):
    """None may take a batch or a sequence of another size for one to broadcast or to cut."""
    k = jnp.zeros(k)
    for name in ATTENTION.names:
        with pytest.raises(ValueError, match=message):
            flash_attention(Q, k, k, implementation=name)
    for attend in (triton.flash_attention, blocked_attention, plain):
        with pytest.raises(ValueError, match=message):
            attend(Q, k, k)


@pytest.mark.parametrize("name", ATTENTION.names)
def test_arrays_that_do_not_go_together_are_refused_by_all(name):
    with pytest.raises(ValueError, match="twice"):
        flash_attention(Q, Q, Q[:, :, :1], implementation=name)
    with pytest.raises(ValueError, match="v bfloat16: want one dtype for all"):
        flash_attention(Q, Q, Q.astype(jnp.bfloat16), implementation=name)
    for ids in ((1, 7), (8,)):
        with pytest.raises(ValueError, match=r"segment_ids \(.*: want \(1, 8\)"):
            flash_attention(Q, Q, Q, segment_ids=jnp.zeros(ids, int), implementation=name)


@pytest.mark.parametrize("attend", [triton.flash_attention, blocked_attention, plain])
@pytest.mark.parametrize(
    ("B", "T", "N", "K", "H"),
    [(0, 8, 2, 1, 16), (1, 0, 2, 1, 16), (1, 8, 0, 1, 16), (1, 8, 2, 0, 16), (1, 8, 2, 1, 0)],
)
def test_sides_of_0_are_refused(attend, B, T, N, K, H):
    q, k = jnp.zeros((B, T, N, H)), jnp.zeros((B, T, K, H))
    with interpreted(), pytest.raises(ValueError, match=r"q \(.*\) and k \(.*: no side may be 0"):
        attend(q, k, k)


def test_head_dim_256_is_taken():
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 1, 256)), jnp.float32)
    with interpreted():
        out = triton.flash_attention(q, q, q)
    np.testing.assert_allclose(out, plain(q, q, q), atol=1e-5)
