"""The decoder's small parts: RMSNorm, Linear (with its LoRA), rotary embeddings, gated MLP."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl.models.config import ModelConfig
from jaxrl.models.params import Scope
from jaxrl.ops.linear import matmul
from jaxrl.ops.norm import rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square layer norm (arXiv:1910.07467), computed in fp32."""

    def __init__(self, scope: Scope, size: int, eps: float, *, hf: str):
        self.scale = scope.declare((size,), (None,), init="ones", hf=f"{hf}.weight")
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Linear(nnx.Module):
    """x @ kernel (+ bias) (+ the low-rank update of LoRA once `models.lora.add_lora` ran)."""

    def __init__(
        self,
        scope: Scope,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        hf: str,
        bias: bool = False,
    ):
        self.scope, self.shape = scope, shape
        self.kernel = scope.declare(shape, axes, hf=f"{hf}.weight", hf_transposed=True)
        self.bias = (
            scope.declare((shape[1],), (None,), init="zeros", hf=f"{hf}.bias") if bias else None
        )
        self.lora_a: nnx.Variable | None = nnx.data(None)
        self.lora_b: nnx.Variable | None = nnx.data(None)
        self.lora_scale = 1.0

    def add_lora(self, rank: int, scale: float) -> None:
        """Declare the adapters A [D, rank] and B [rank, F]; they add scale x A B."""
        (d_in, d_out), declare, kind = self.shape, self.scope.declare, nnx.LoRAParam
        self.lora_a = declare((d_in, rank), ("lora", None), init="kaiming_uniform", kind=kind)
        self.lora_b = declare((rank, d_out), (None, "lora"), init="zeros", kind=kind)
        self.lora_scale = scale

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T F"]:
        y = matmul(x, self.kernel[...])
        if self.lora_a is not None and self.lora_b is not None:
            y = y + self.lora_scale * matmul(matmul(x, self.lora_a[...]), self.lora_b[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202), F features wide."""

    def __init__(self, D: int, F: int, scope: Scope):
        self.gate = Linear(scope, (D, F), ("embed", "mlp"), hf="gate_proj")
        self.up = Linear(scope, (D, F), ("embed", "mlp"), hf="up_proj")
        self.down = Linear(scope, (F, D), ("mlp_hidden", "residual"), hf="down_proj")

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rope_frequencies(config: ModelConfig) -> Float[Array, " P"]:
    """Angular frequency of each rotated pair, with Llama-3's scaling where the config has it."""
    turned = config.rotary_dim
    frequency = config.rope_theta ** (-jnp.arange(0, turned, 2, dtype=jnp.float32) / turned)
    if (s := config.rope_scaling) is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    old = s.original_max_position_embeddings
    smooth = (old / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequency * (smooth + (1.0 - smooth) / s.factor)


def rope_tables(config: ModelConfig, positions: Int[Array, "B T"]):
    """(cos, sin), fp32 [B, T, P] each, of the rotation of each pair at each position."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T P"], sin: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """Rotate the P pairs (x[i], x[i + P]) of the first 2 P features; the others stay.

    arXiv:2104.09864 in Hugging Face's half-split layout.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        rotated = apply_rope(x[..., :turned], cos, sin)
        return jnp.concatenate([rotated, x[..., turned:]], axis=-1)
    pairs = x.reshape(*x.shape[:-1], 2, -1).astype(jnp.float32)  # [B, T, N, 2, P]
    cos = cos[:, :, None, None, :]
    sin = jnp.stack([-sin, sin], axis=-2)[:, :, None]
    return (pairs * cos + jnp.flip(pairs, -2) * sin).reshape(x.shape).astype(x.dtype)
