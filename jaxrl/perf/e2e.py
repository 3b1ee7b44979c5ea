"""Whole steps of reinforcement learning: rollouts, one update, the new weights to the engine.

The engine draws on the trainer's devices, in turns with the training step. Prompts are random
tokens, every completion goes on to the row's `seq_len`, and advantages are random, so that all
steps are the same work whatever the weights are.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl.config import BenchConfig
from jaxrl.envs.protocol import Task
from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.perf import compile_only, plan
from jaxrl.perf.hardware import GiB
from jaxrl.rollout.engine import Engine, EngineLimits, lower_decode
from jaxrl.rollout.programs import Programs
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.rollouts import Rollout
from jaxrl.train.batch import Batch
from jaxrl.train.program import Program, local_bytes
from jaxrl.train.rl_batch import device_batch, pack_rollouts
from jaxrl.train.rl_rollouts import make_programs
from jaxrl.train.state import TrainState

PHASES = ("rollout_s", "wait_s", "train_s", "sync_s", "total_s")


def limits(program: Program, config: BenchConfig) -> EngineLimits:
    """Room for all of a step's rollouts, or for `e2e.slots` of them on each device at once."""
    each = -(-config.e2e.tasks * config.e2e.group_size // program.layout.mesh.size)
    return EngineLimits(slots=min(each, config.e2e.slots), max_len=program.seq_len)


def cache_bytes(program: Program, config: BenchConfig) -> int:
    """Of the engine's keys and values, on each device."""
    sizes = limits(program, config)
    return local_bytes(make_programs(program).abstract_cache(sizes.pages, sizes.page))


def plan_e2e(program: Program, config: BenchConfig, gpu_name: str) -> dict[str, Any]:
    """As `plan.plan_program`, with the engine."""
    planned, text = plan.plan_memory(program, gpu_name)
    parts = make_programs(program), limits(program, config)
    return plan_engine(planned, program, *parts, gpu_name) | plan.count_flops(program, text)


def plan_engine(
    planned: dict[str, Any],
    program: Program,
    programs: Programs,
    sizes: EngineLimits,
    gpu_name: str,
) -> dict[str, Any]:
    """What is `planned` of the training step, with an engine on its devices: the peak is that of
    the step with the engine's cache beside it, or that of the largest decode program with the
    optimizer's state beside it; and beside both what the engine and the trainer have of the
    parameters in copies of their own."""
    state: TrainState = program.layout.abstract()
    weights = merge_trees(state.params, state.frozen)
    own = programs.abstract_own(weights)
    with compile_only.as_device(program.layout.mesh), compile_only.cudnn_assumed():
        lowered = lower_decode(programs, sizes, own)
    decode = compile_only.memory(compile_only.compile_for(lowered)).peak
    cache = local_bytes(programs.abstract_cache(sizes.pages, sizes.page))
    pairs = list(zip(jax.tree.leaves(own), jax.tree.leaves(weights), strict=True))
    moved = [
        (o, w)
        for o, w in pairs
        if o.dtype != w.dtype or not o.sharding.is_equivalent_to(w.sharding, len(w.shape))
    ]
    copies, copied = local_bytes([o for o, _ in moved]), local_bytes([w for _, w in moved])
    peaks = {
        "train_peak_gib": planned["peak_mem_gib"] + (cache + copies) / GiB,
        "decode_peak_gib": (decode + copied + local_bytes(state.opt_state)) / GiB,
    }
    peak = max(peaks.values())
    plan.check_fits(peak, gpu_name)
    floor = planned["floor_mem_gib"] + (cache + copies) / GiB
    found = {"peak_mem_gib": peak, "floor_mem_gib": floor, "cache_gib": cache / GiB}
    return planned | peaks | found | {"engine_weights_gib": copies / GiB}


def time_e2e(
    program: Program,
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]],
    config: BenchConfig,
    progress: Callable[..., None],
) -> tuple[list[float], dict[str, float]]:
    """(seconds of `config.steps` steps, medians of the seconds of `PHASES` with tokens per second
    of rollouts, drawn ones, and of training). `step` is the program's, compiled. The devices are
    synchronised between the phases."""
    if jax.process_count() > 1:
        raise ConfigError("rl_e2e over several hosts is not there yet; use the GPUs of one")
    prompt = config.e2e.prompt_tokens or program.seq_len // 4
    if prompt >= program.seq_len:
        raise ConfigError(f"e2e.prompt_tokens {prompt} leaves no room in {program.seq_len} tokens")
    state = program.layout.initialize(jax.random.key(config.seed))
    engine = Engine(make_programs(program), limits(program, config))
    engine.set_weights(merge_trees(state.params, state.frozen), 0)
    found: list[tuple[float, ...]] = []
    for i in range(config.warmup_steps + config.steps):
        timed = i - config.warmup_steps
        begin = time.perf_counter()
        rollouts = draw(engine, program, config, prompt, seed=config.seed + i)
        drawn = time.perf_counter()
        batch = to_batch(program, rollouts, seed=config.seed + i)
        state, metrics = jax.block_until_ready(step(state, batch))
        trained = time.perf_counter()
        engine.set_weights(merge_trees(state.params, state.frozen), i + 1)
        jax.block_until_ready(engine.weights)
        end = time.perf_counter()
        if timed < 0:
            progress("warming up", i + 1, config.warmup_steps)
            continue
        found.append((drawn - begin, 0.0, trained - drawn, end - trained, end - begin))
        loss = float(metrics["loss"])
        progress("step", timed + 1, config.steps, loss=loss, total_s=end - begin)
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    seconds = dict(zip(PHASES, medians, strict=True))
    count = config.e2e.tasks * config.e2e.group_size
    return [times[-1] for times in found], seconds | {
        "tokens_per_s_rollout": count * (program.seq_len - prompt) / seconds["rollout_s"],
        "tokens_per_s_train": count * program.seq_len / seconds["train_s"],
    }


def draw(
    engine: Engine, program: Program, config: BenchConfig, prompt: int, *, seed: int
) -> list[Rollout]:
    """A step's rollouts, each of `seq_len` tokens, `prompt` of them random."""
    rng = np.random.default_rng(seed)
    vocab = program.layout.model.config.vocab_size
    prompts = rng.integers(0, vocab, (config.e2e.tasks, prompt)).tolist()
    how = Sampling(n=config.e2e.group_size, ignore_eos=True, seed=seed)
    rollouts = []
    for request in engine.generate(prompts, how):
        for completion in request.completions:
            rollout = Rollout(Task("random", ()))
            rollout.say(list(request.prompt))
            rollout.draw(completion.tokens, completion.logprobs, completion.versions)
            rollouts.append(rollout)
    return rollouts


def to_batch(program: Program, rollouts: list[Rollout], *, seed: int) -> Batch:
    """The training step's, with random advantages."""
    rows = pack_rollouts(
        rollouts,
        np.random.default_rng(seed).standard_normal(len(rollouts)).tolist(),
        seq_len=program.seq_len,
        rows=program.rows,
        micro_batches=program.micro_batches,
        pad_id=0,
    )
    return device_batch(program, rows)
