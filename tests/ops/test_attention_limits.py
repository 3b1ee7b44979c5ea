"""What attention takes at its limits, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxrl_kernels.flash_attention import reference, triton
from jaxrl_kernels.launch import interpreted

from jaxrl.ops.attention_xla import blocked_attention

Q = jnp.zeros((1, 8, 2, 16))


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "message"),
    [
        (Q, Q, Q.astype(jnp.bfloat16), None, "want one of bfloat16, float16, float32 for all"),
        (*[Q.astype(jnp.int32)] * 3, None, "want one of bfloat16, float16, float32 for all"),
        (Q, Q[..., :8], Q[..., :8], None, "B, T and H must agree"),
        (Q, Q, Q, 0.0, r"scale 0\.0 is not above 0"),
        (*[jnp.zeros((1, 8, 2, 257))] * 3, None, "head_dim 257 is above 256"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(q, k, v, scale, message):
    with interpreted(), pytest.raises(ValueError, match=message):
        triton.flash_attention(q, k, v, scale=scale)


@pytest.mark.parametrize("attend", [triton.flash_attention, blocked_attention])
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
    np.testing.assert_allclose(out, reference.flash_attention(q, q, q), atol=1e-5)
