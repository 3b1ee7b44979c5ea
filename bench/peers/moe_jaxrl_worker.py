"""Ours: an expert layer, forward and backward, as the model runs it; in jaxrl's environment."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import serve, timed
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.moe import ExpertOps, MoE, mix
from jaxrl.models.params import Scope
from jaxrl.ops.grouped_matmul import resolve_grouped_matmul
from jaxrl.ops.registry import Target
from jaxrl.perf import provenance


def model_config(shape):
    """The layer's shape in a model's config; what a single expert layer has not got is 1."""
    absent = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    return ModelConfig(
        name="peer",
        architecture="Qwen3MoeForCausalLM",
        **dict.fromkeys(absent, 1) | {"head_dim": 2},
        intermediate_size=shape["moe_intermediate_size"],
        rope_theta=1e4,
        norm_topk_prob=True,
        **shape,
    )


class Layer:
    def start(self, shape, tensors, options, threads):
        """tensors: a file of weights, input and cotangent. options: implementation=xla."""
        del threads  # XLA uses the CPUs this process is bound to
        config = model_config(shape)
        grouped = resolve_grouped_matmul(
            options.get("implementation", "xla"),
            target=Target.here(),
            dtype=jnp.dtype("float32"),
            features=(config.hidden_size, config.moe_intermediate_size),
        )
        graph, _ = nnx.split(MoE(config, Scope()))

        def layer(params, x):
            moe = nnx.merge(graph, params)
            scores = moe.router.scores(x)
            chosen = moe.router.choose(scores)
            weights = moe.router.weigh(scores, chosen)
            return mix(moe.experts, moe.shared, x, weights, chosen, ExpertOps(grouped))

        def forward_backward(params, x, dy):
            y, pull_back = jax.vjp(layer, params, x)
            return y, *pull_back(dy)

        given = load_file(tensors)
        gate, up = np.split(given["experts.gate_up_proj"], 2, axis=1)  # [E, 2 F, D]
        turned = {"gate": gate, "up": up, "down": given["experts.down_proj"]}
        params = {
            "router": {"kernel": given["gate.weight"].T},
            "experts": {k: {"kernel": v.swapaxes(1, 2)} for k, v in turned.items()},
        }
        params = nnx.State(jax.tree.map(jnp.asarray, params))
        self.arguments = (params, jnp.asarray(given["x"]), jnp.asarray(given["dy"]))
        self.compiled = jax.jit(forward_backward).lower(*self.arguments).compile()
        return {
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "source": provenance.source_hash(),
            "xla_flags": provenance.flags(),
            "temp_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
        }

    def results(self, path):
        """Write output and gradients, under the peer's names and in its layouts."""
        y, params, dx = self.compiled(*self.arguments)
        params = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
        experts = {k: v["kernel"].swapaxes(1, 2) for k, v in params["experts"].items()}
        results = {
            "y": np.asarray(y),
            "x": np.asarray(dx),
            "gate.weight": params["router"]["kernel"].T,
            "experts.gate_up_proj": np.concatenate([experts["gate"], experts["up"]], axis=1),
            "experts.down_proj": experts["down"],
        }
        save_file({k: np.ascontiguousarray(v) for k, v in results.items()}, path)
        return {}

    def steps(self, count):
        with jax.transfer_guard("disallow"):
            return timed(lambda: _wait(self.compiled(*self.arguments)), count)


def _wait(results):
    jax.block_until_ready(results)


layer = Layer()
serve({"start": layer.start, "results": layer.results, "steps": layer.steps})
