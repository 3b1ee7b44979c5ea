"""Leaving an update out costs no memory, on CPU and as compiled for a GPU that is not here."""

import dataclasses
import functools

import jax
import optax
import pytest
from tiny import TINY

from jaxrl.config import LoraOptions, OptimizerConfig, StepConfig
from jaxrl.parallel.mesh import make_mesh
from jaxrl.perf import compile_only
from jaxrl.train.program import Program, build_program

# The state outweighs all else, so that a copy of any of it shows.
MODEL = TINY.replace(hidden_size=256, intermediate_size=1024, vocab_size=2048)


def program_on(devices, name: str, **step) -> Program:
    return build_program(
        MODEL,
        mesh=make_mesh(devices),
        step=StepConfig(type="sft", **({"compute_dtype": "float32"} | step)),
        optimizer=OptimizerConfig(name=name),
        lora_rank=0,
        lora=LoraOptions(),
        seq_len=128,
        micro_batches=2,
    )


def unguarded(program: Program) -> Program:
    """The program with updates that nothing leaves out."""
    optimizer = program.layout.optimizer

    def update(updates, state, params=None, *, keep):
        del keep
        return optimizer.update(updates, state, params)

    always = optax.GradientTransformationExtraArgs(optimizer.init, update)
    layout = dataclasses.replace(program.layout, optimizer=always)
    step = type(program.step)(layout, program.step.config)
    return dataclasses.replace(program, step=step)


def parameter_bytes(program: Program) -> int:
    return sum(4 * s.size for s in program.layout.trainable_specs.values())


@pytest.mark.parametrize(
    ("name", "offload"), [("adamw", False), ("adamw", True), ("muon", False), ("sgd", False)]
)
def test_on_cpu(name, offload):
    """Of those whose state has the parameters' size."""
    program = program_on(jax.devices("cpu")[:1], name, offload_optimizer=offload)
    temp, without = (
        p.lower().compile().memory_analysis().temp_size_in_bytes
        for p in (program, unguarded(program))
    )
    # Streamed: something of one layer's.
    assert temp <= without + (0.15 if offload else 0.01) * parameter_bytes(program)


@functools.cache
def gpu_temp(name: str, *, guard: bool) -> int:
    devices = compile_only.topology("H100", 1)
    program = program_on(devices, name, compute_dtype="bfloat16", attention="xla")
    program = program if guard else unguarded(program)
    with compile_only.as_device(program.layout.mesh):
        return compile_only.memory(compile_only.compile_for(program.lower())).temp


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_a_gpu(name):
    """Nor does Muon need more than AdamW: it turns one layer at a time."""
    assert gpu_temp(name, guard=True) <= 1.02 * gpu_temp("adamw", guard=False)
