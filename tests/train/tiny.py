"""A model small enough for every training test, its program, and a batch for it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import LoraOptions, OptimizerConfig, StepConfig
from jaxrl.models.config import ModelConfig
from jaxrl.parallel.mesh import make_mesh
from jaxrl.train.batch import Batch
from jaxrl.train.program import Program, build_program
from jaxrl.train.state import TrainState

TINY = ModelConfig(
    name="tiny",
    architecture="Qwen3ForCausalLM",
    vocab_size=128,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rope_theta=1e4,
    tie_embeddings=True,
    qk_norm=True,
)
# As Qwen3-MoE.
TINY_MOE = TINY.replace(
    name="tiny-moe",
    architecture="Qwen3MoeForCausalLM",
    num_layers=2,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    tie_embeddings=False,
)
# As GLM-4.5: dense first layer, shared expert, sigmoid router, half of each head turned.
TINY_GLM = TINY_MOE.replace(
    name="tiny-glm",
    architecture="Glm4MoeForCausalLM",
    first_k_dense=1,
    num_shared_experts=1,
    router="sigmoid",
    qk_norm=False,
    attention_bias=True,
    attention_out_bias=False,
    partial_rotary_factor=0.5,
    routed_scaling_factor=1.5,
)


def tiny_program(
    devices: int = 1,
    *,
    model: ModelConfig = TINY,
    rank: int = 0,
    expert: int = 1,
    context: int = 1,
    rows: int = 8,
    seq_len: int = 32,
    micro_batches: int = 2,
    optimizer: OptimizerConfig | None = None,
    **step,
) -> Program:
    """fp32 throughout, so that programs that should agree do to rounding."""
    return build_program(
        model,
        mesh=make_mesh(jax.devices("cpu")[:devices], expert, context),
        step=StepConfig(**({"compute_dtype": "float32"} | step)),
        optimizer=optimizer or OptimizerConfig(learning_rate=1e-2),
        lora_rank=rank,
        lora=LoraOptions(),
        seq_len=seq_len,
        micro_batches=micro_batches,
        rows_per_device=rows * context // devices,
    )


def tiny_state(program: Program, seed: int = 0) -> TrainState:
    """Random parameters, LoRA's B included, so that every gradient is alive. Compiles nothing."""
    rng = np.random.default_rng(seed)
    abstract = program.layout.abstract()

    def fill(path, s):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        router = any(key.key == "router" for key in path)  # wide: no two experts are nearly tied
        value = mean + (0.5 if router else 0.05) * rng.standard_normal(s.shape)
        return jax.device_put(value.astype(s.dtype), s.sharding)

    params, frozen = (
        jax.tree_util.tree_map_with_path(fill, tree) for tree in (abstract.params, abstract.frozen)
    )
    zeros = jax.tree.map(
        lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding),
        (abstract.step, abstract.opt_state),
    )
    return TrainState(zeros[0], params, frozen, zeros[1])


def tiny_batch(program: Program, *, packed: bool = False, seed: int = 0) -> Batch:
    """Random tokens, uneven masks, and RL inputs near the policy, so that tokens are kept."""
    rng = np.random.default_rng(seed)
    shape = (program.micro_batches, program.rows, program.seq_len)
    vocab = program.layout.model.config.vocab_size
    mask = (rng.random(shape) < rng.random((*shape[:2], 1))).astype(np.int32)
    segments = positions = None
    if packed:
        segments = np.sort(rng.integers(0, 4, shape, np.int32), axis=-1)
        index = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        first = np.pad(np.diff(segments) != 0, [(0, 0), (0, 0), (1, 0)], constant_values=True)
        positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=-1)
    rl = program.step.config.type == "rl"

    def near() -> np.ndarray:
        return (-np.log(vocab) + 0.3 * rng.standard_normal(shape, np.float32)).astype(np.float32)

    batch = Batch(
        tokens=rng.integers(0, vocab, shape, np.int32),
        loss_mask=mask,
        positions=positions,
        segment_ids=segments,
        advantages=rng.standard_normal(shape, np.float32) if rl else None,
        sampler_logprobs=near() if rl else None,
        ref_logprobs=near() if rl and program.step.config.loss.ref_kl_coef else None,
    )
    return jax.tree.map(jnp.asarray, batch)


def relative_error(a, b) -> float:
    """Largest difference over the largest value, the worst over a tree's leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / max(np.max(np.abs(y)), 1e-30))
        for x, y in pairs
    )
