"""Mixture-of-experts layers: a router, the experts that tokens are sent to, a shared expert.

No token is dropped and nothing is padded to a capacity (arXiv:2211.15841): each token's rows are
sorted by expert, and one grouped product serves all experts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxrl_kernels.permute import permute, route, unpermute
from jaxtyping import Array, Float, Int

from jaxrl.models.config import ModelConfig
from jaxrl.models.layers import MLP
from jaxrl.models.params import Buffer, Scope
from jaxrl.ops.grouped_matmul import GroupedOps


@dataclasses.dataclass(frozen=True)
class ExpertOps:
    """How expert layers run: the grouped products, and the way to experts on other devices.

    exchange(rows [M, D], group_sizes [E]) -> (rows of this device's experts, sorted by expert;
    their group sizes; a function that takes results of those rows back to where they came from).
    None: every expert is here.
    `chunk`: tokens that go through the experts at a time (0: all of them).
    """

    grouped: GroupedOps
    exchange: Callable | None = None
    chunk: int = 0


class Router(nnx.Module):
    """Scores of every expert for every token, in fp32, and the experts chosen by them."""

    def __init__(self, config: ModelConfig, scope: Scope):
        D, E = config.hidden_size, config.num_experts
        self.config = config
        self.kernel = scope.declare(
            (D, E), ("embed", None), hf="gate.weight", hf_transposed=True, fp32=True
        )
        self.bias = (
            scope.declare(
                (E,),
                (None,),
                init="zeros",
                hf="gate.e_score_correction_bias",
                kind=Buffer,
                fp32=True,
            )
            if config.router == "sigmoid"
            else None
        )

    def scores(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """The softmax or sigmoid of the router's logits, fp32."""
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.kernel[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,  # a GPU would round to TF32
        )
        if self.config.router == "sigmoid":
            return jax.nn.sigmoid(logits)
        return jax.nn.softmax(logits, axis=-1)

    def choose(self, scores: Float[Array, "T E"]) -> Int[Array, "T k"]:
        """Each token's experts. The correction bias counts for the choice, not for the weight."""
        if self.bias is not None:
            scores = scores + self.bias[...]
        return jax.lax.top_k(jax.lax.stop_gradient(scores), self.config.num_experts_per_tok)[1]

    def weigh(self, scores: Float[Array, "T E"], experts: Int[Array, "T k"]) -> Float[Array, "T k"]:
        """The weights of the chosen experts' results."""
        # Not take_along_axis: its gradient is a scatter.
        chosen = experts[..., None] == jnp.arange(self.config.num_experts)
        weights = jnp.sum(jnp.where(chosen, scores[:, None, :], 0.0), axis=-1)
        if self.config.norm_topk_prob:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return weights * self.config.routed_scaling_factor


class Experts(nnx.Module):
    """E gated MLPs, their weights stacked: down(silu(gate(x)) * up(x)) with each row's own."""

    def __init__(self, config: ModelConfig, scope: Scope):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.gate = ExpertLinear(scope, (E, D, F), hf="experts.{e}.gate_proj")
        self.up = ExpertLinear(scope, (E, D, F), hf="experts.{e}.up_proj")
        self.down = ExpertLinear(scope, (E, F, D), hf="experts.{e}.down_proj")

    def __call__(
        self, rows: Float[Array, "M D"], group_sizes: Int[Array, " E"], ops: GroupedOps
    ) -> Float[Array, "M D"]:
        """Rows are sorted by expert: group_sizes[0] of the first, and so on."""
        if self.gate.lora_a is None and self.up.lora_a is None:
            h = ops.swiglu(rows, self.gate.kernel[...], self.up.kernel[...], group_sizes)
        else:
            gate = self.gate(rows, group_sizes, ops)
            h = jax.nn.silu(gate) * self.up(rows, group_sizes, ops)
        return self.down(h, group_sizes, ops)


class ExpertLinear(nnx.Module):
    """x @ kernel[e] (+ the low-rank update of LoRA once `models.lora.add_lora` ran)."""

    def __init__(self, scope: Scope, shape: tuple[int, int, int], *, hf: str):
        self.scope, self.shape = scope, shape
        self.kernel = scope.declare(
            shape, ("experts", None, None), hf=f"{hf}.weight", hf_transposed=True
        )
        self.lora_a: nnx.Variable | None = nnx.data(None)
        self.lora_b: nnx.Variable | None = nnx.data(None)
        self.lora_scale = 1.0

    def add_lora(self, rank: int, scale: float) -> None:
        E, d_in, d_out = self.shape
        declare, kind = self.scope.declare, nnx.LoRAParam
        axes = ("experts", None, None)
        self.lora_a = declare((E, d_in, rank), axes, init="kaiming_uniform", kind=kind)
        self.lora_b = declare((E, rank, d_out), axes, init="zeros", kind=kind)
        self.lora_scale = scale

    def __call__(self, x: Float[Array, "M K"], group_sizes, ops: GroupedOps):
        if self.lora_a is None or self.lora_b is None:
            return ops.matmul(x, self.kernel[...], group_sizes)
        b = self.lora_scale * self.lora_b[...]
        return ops.lora_matmul(x, self.kernel[...], self.lora_a[...], b, group_sizes)


class MoE(nnx.Module):
    """Router, experts, and the shared expert where the model has one. `mix` is its last step."""

    def __init__(self, config: ModelConfig, scope: Scope):
        scope = scope.child("mlp.")
        self.router = Router(config, scope)
        self.experts = Experts(config, scope)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared = (
            MLP(config.hidden_size, shared, scope.child("shared_experts.")) if shared else None
        )


def mix(
    experts: Experts,
    shared: MLP | None,
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    chosen: Int[Array, "T k"],
    ops: ExpertOps,
) -> Float[Array, "T D"]:
    """Each token's weighted sum over its chosen experts, plus the shared expert's result."""
    routing = route(chosen, experts.num_experts)
    linears = (experts.gate, experts.up, experts.down)
    adapted = any(linear.lora_a is not None for linear in linears)
    if ops.exchange is None and ops.grouped.experts is not None and not adapted:
        y = ops.grouped.experts(x, weights, routing, *(linear.kernel[...] for linear in linears))
        return y if shared is None else y + shared(x)
    rows, sizes = permute(x, routing), routing.group_sizes
    if ops.exchange is None:
        rows = experts(rows, sizes, ops.grouped)
    else:
        rows, sizes, back = ops.exchange(rows, sizes)
        rows = back(experts(rows, sizes, ops.grouped))
    y = unpermute(rows, weights, routing)
    return y if shared is None else y + shared(x)


def expert_load(experts: Int[Array, "T k"], num_experts: int) -> Float[Array, " E"]:
    """How many of these choices fell on each expert, fp32."""
    one_hot = experts.reshape(-1, 1) == jnp.arange(num_experts)
    return jnp.sum(one_hot, axis=0, dtype=jnp.float32)
