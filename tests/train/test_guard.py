"""An update that would spoil the model is left out; optimizers agree on one device and eight."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import TINY, TINY_GLM, TINY_MOE, relative_error, tiny_batch, tiny_program, tiny_state

from jaxrl.config import OptimizerConfig
from jaxrl.train.batch import Batch
from jaxrl.train.program import Program
from jaxrl.train.state import TrainState

OPTIMIZERS = ("adamw", "muon", "adafactor", "sgd")


def optimizer(name: str) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=1e-2, schedule="linear", total_steps=8)


def changed(batch: Batch, program: Program, kind: str) -> Batch:
    """The batch with something wrong in the last micro-batch of the last device."""
    if kind == "no trained token":
        return dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    advantages = np.array(batch.advantages)
    advantages[-1, -1, -8:] = np.nan if kind == "nan" else np.inf
    mask = np.array(batch.loss_mask)
    mask[-1, -1, -8:] = 1
    return dataclasses.replace(batch, advantages=advantages, loss_mask=mask)


def host(state: TrainState) -> TrainState:
    return jax.tree.map(np.array, state)


def same_bits(got: TrainState, expected: TrainState, *parts: str) -> None:
    """-0.0 is not 0.0 here."""
    for part in parts:
        trees = (getattr(host(s), part) for s in (got, expected))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32)), *trees
        )


def with_minus_zeros(state: TrainState) -> TrainState:
    params = jax.tree.map(lambda p: p.at[..., 0].set(-0.0), state.params)
    return dataclasses.replace(state, params=params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_batches_change_nothing_but_the_step(name):
    program = tiny_program(8, type="rl", optimizer=optimizer(name))
    batch, state = tiny_batch(program), tiny_state(program)
    state, first = program.step(state, batch)
    assert first["skipped"] == 0 and first["lr"] == pytest.approx(1e-2)
    state = with_minus_zeros(state)
    before = host(state)
    for count, kind in enumerate(("nan", "inf", "no trained token"), 2):
        state, metrics = program.step(state, changed(batch, program, kind))
        assert metrics["skipped"] == 1 and int(state.step) == count, kind
        assert metrics["lr"] == pytest.approx(1e-2 * 7 / 8), kind
        same_bits(state, before, "params", "frozen", "opt_state")
    after, metrics = program.step(state, batch)
    spared, _ = program.step(jax.device_put(before, program.layout.shardings()), batch)
    assert metrics["skipped"] == 0 and int(after.step) == 5
    same_bits(after, spared, "params", "opt_state")


def test_router_bias_is_spared_too():
    program = tiny_program(8, model=TINY_GLM, type="rl", router_bias_rate=0.1)
    batch, state = tiny_batch(program), tiny_state(program)
    before = host(state)
    state, _ = program.step(state, changed(batch, program, "nan"))
    same_bits(state, before, "frozen")
    state, _ = program.step(state, batch)
    bias = [f["layers"]["mlp"]["router"]["bias"] for f in (host(state).frozen, before.frozen)]
    assert np.all(np.abs(bias[0] - bias[1]) > 0.09)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_streamed_updates_are_spared_too(name):
    program = tiny_program(8, type="rl", optimizer=optimizer(name), offload_optimizer=True)
    batch, state = tiny_batch(program), tiny_state(program)
    state, _ = program.step(state, batch)
    state = with_minus_zeros(state)
    before = host(state)
    state, metrics = program.step(state, changed(batch, program, "nan"))
    assert metrics["skipped"] == 1
    same_bits(state, before, "params", "opt_state")


CASES = {
    "full": {"model": TINY},
    "lora": {"model": TINY, "rank": 4},
    "experts": {"model": TINY_MOE, "expert": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])  # test_step.py's
def test_eight_devices_are_one(name, case):
    def run(devices: int) -> TrainState:
        options = CASES[case] | ({"expert": 1} if devices == 1 else {})
        program = tiny_program(devices, type="sft", optimizer=optimizer(name), **options)
        state, batch = tiny_state(program), tiny_batch(program)
        for _ in range(2):
            state, _ = program.step(state, batch)
        return host(state)

    one, eight = run(1), run(8)
    start = host(
        tiny_state(
            tiny_program(
                1,
                type="sft",
                optimizer=optimizer(name),
                **{k: v for k, v in CASES[case].items() if k != "expert"},
            )
        )
    )
    moved = relative_error(one.params, start.params)
    assert moved > 1e-3
    assert relative_error(eight.params, one.params) < 2e-3 * moved
    assert relative_error(eight.opt_state, one.opt_state) < 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_parameters_shape_lies_as_the_parameter_does(name):
    layout = tiny_program(8, model=TINY_MOE, expert=4, optimizer=optimizer(name)).layout
    abstract = layout.abstract()
    whole = {s.shape: s.sharding for s in jax.tree.leaves(abstract.params)}
    kept = [s for s in jax.tree.leaves(abstract.opt_state) if s.shape in whole and s.ndim > 1]
    assert len(kept) >= len(jax.tree.leaves(abstract.params)) / 2
    for s in kept:
        assert s.sharding.shard_shape(s.shape) == whole[s.shape].shard_shape(s.shape)


def test_factored_state_is_divided_where_its_dimension_is():
    model = TINY.replace(hidden_size=128, intermediate_size=256)
    layout = tiny_program(8, model=model, optimizer=optimizer("adafactor")).layout
    state = next(s for s in layout.abstract().opt_state if hasattr(s, "v_row"))
    up = {"v_row": state.v_row, "v_col": state.v_col}
    shapes = {k: v["layers"]["mlp"]["up"]["kernel"] for k, v in up.items()}
    parts = {s.shape: s.sharding.shard_shape(s.shape) for s in shapes.values()}
    assert parts == {(3, 128): (3, 16), (3, 256): (3, 256)}
