"""`jaxrl.rl` with rollouts of Ray's actors: the same run; one that is killed; none at all."""

import asyncio
import os
import pathlib
import signal
import threading
import types

import jax
import pytest
from flax import nnx
from test_rl import rl
from tiny_run import assert_alike, tiny_checkpoint

from jaxrl.models.hf import load_pretrained
from jaxrl.options import ConfigError
from jaxrl.rollout import ray_workers as module
from jaxrl.rollout import workers
from jaxrl.rollout.handover import Handover
from jaxrl.rollout.ray_workers import EngineActor, RayWorker, ray_workers
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import WorkerLost, WorkerPool
from jaxrl.serve_config import EngineConfig, ServeConfig

pytestmark = pytest.mark.slow
ENGINE = EngineConfig(max_len=128, slots=8, dtype="float32", warm_up=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "model")


@pytest.mark.parametrize("rank", [0, 4])
def test_learns_the_same_from_an_actor(model, tmp_path, rank):
    flags = ("max_steps=2", "checkpoint.every=0", f"lora_rank={rank}")
    assert rl(model, tmp_path / "own/run", *flags) == 0
    assert rl(model, tmp_path / "drawn/run", *flags, "rollout.ray_workers=1") == 0
    assert_alike(tmp_path / "own/run", tmp_path / "drawn/run")


def test_an_actor_that_is_killed_is_replaced_and_its_requests_go_to_others(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "PROBE_S", 0.5)
    import ray

    loaded = load_pretrained(model)
    weights = nnx.to_pure_dict(nnx.state(loaded))
    handover = Handover(loaded, tmp_path / "weights", model, "float32")
    said, back = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if "ray-0 is back" in line:
            back.set()

    with (
        ray_workers(ServeConfig(model=str(model), engine=ENGINE), 2) as actors,
        WorkerPool(actors, handover, say=say) as pool,
    ):
        pool.set_weights(weights, 1)
        victim = ray.get(actors[0].actor.process.remote())
        how = Sampling(max_tokens=40, n=4, ignore_eos=True, temperature=0.0)
        requests = [pool.submit([1, 2, 3 + i], how) for i in range(4)]
        os.kill(victim, signal.SIGKILL)
        while not all(request.finished for request in requests):
            pool.step()
        assert all(len(c.tokens) == 40 for request in requests for c in request.completions)
        assert any(line.startswith("rollout worker ray-0 is lost") for line in said)

        doubled = jax.tree.map(lambda a: 2 * a, weights)
        pool.set_weights(doubled, 2)
        assert back.wait(120)
        assert ray.get(actors[0].actor.process.remote()) != victim
        one, other = (pool._run(a.complete([1, 2, 3], how)).result() for a in actors)
        assert one == other  # of the newest weights, which it was told when it came back
        assert one[0].tokens != requests[0].completions[0].tokens


def test_an_actor_that_was_started_again_is_a_lost_worker():
    """As Ray does while nothing is asked of it: nobody hears of it but by its version."""
    from ray.exceptions import RayTaskError

    class Method:
        def __init__(self, call):
            self.call = call

        async def remote(self, *args):
            try:
                return await self.call(*args)
            except WorkerLost as error:
                raise RayTaskError("complete", "", error) from None

    async def update(folder, version):
        del folder, version

    engine = types.SimpleNamespace(version=0)
    inner = EngineActor.__new__(EngineActor)
    service = types.SimpleNamespace(alive=True, engine=engine)
    inner._served = types.SimpleNamespace(service=service)
    actor = types.SimpleNamespace(complete=Method(inner.complete), update=Method(update))

    async def calls():
        worker = RayWorker("ray-0", actor)
        await worker.update(pathlib.Path("/w"), 3)
        await worker.complete([1], Sampling())

    with pytest.raises(WorkerLost, match=r"^it draws with weights 0 where it was given 3"):
        asyncio.run(calls())


def test_what_cannot_be_started_is_told_in_a_line(model, tmp_path, monkeypatch):
    missing = ServeConfig(model=str(tmp_path / "nothing"), engine=ENGINE)
    with pytest.raises(ConfigError, match=r"cannot be started: .*nothing"), ray_workers(missing, 1):
        pass
    monkeypatch.setattr(module, "START_S", 1.0)
    served = ServeConfig(model=str(model), engine=ENGINE)
    asked = pytest.raises(ConfigError, match=r"1 rollout workers of 1 GPUs within 1 s; it has")
    with asked, ray_workers(served, 1, gpus=1):
        pass
