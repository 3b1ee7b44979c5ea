"""Actors of a Ray cluster that draw rollouts; Ray places them, and starts those that die again.

Each holds an engine on the accelerators that Ray gives it. Weights reach it as the folders that
servers read, too: all hosts see the same paths.
"""

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrl._platform import MEMORY_FRACTION
from jaxrl.options import ConfigError
from jaxrl.rollout.handover import COMPLETE
from jaxrl.rollout.requests import Sampling
from jaxrl.rollout.workers import Drawn, WorkerBusy, WorkerLost
from jaxrl.serve_config import ServeConfig

START_S = 600.0  # for an actor to load its model


class EngineActor:
    """What an actor is: a server's engine, asked by method calls. Raises as `workers.Worker`."""

    def __init__(self, config: ServeConfig):
        from jaxrl.serving.start import started

        self._open = contextlib.ExitStack()
        self._served = self._open.enter_context(started(config))

    async def process(self) -> int:
        """The id of the actor's process, once it has its model."""
        return os.getpid()

    async def complete(
        self, prompt: Sequence[int], sampling: Sampling, version: int | None = None
    ) -> list[Drawn]:
        """version: of the weights it was given; one that was started again has older ones."""
        from jaxrl.serving.service import Busy

        self._check()
        has = self._served.service.engine.version
        if version is not None and has < version:
            raise WorkerLost(f"it draws with weights {has} where it was given {version}")
        try:
            ticket = await self._served.service.submit(prompt, sampling)
        except Busy:
            raise WorkerBusy from None
        try:
            async for _ in ticket.deltas():
                pass
        finally:
            ticket.close()
        return [
            Drawn(c.tokens, c.logprobs, c.text, "stop" if c.finish == "stop" else "length")
            for c in ticket.request.completions
        ]

    async def update(self, folder: str, version: int) -> None:
        from jaxrl.serving.served import NotWhole

        self._check()
        try:
            await self._served.update(folder, version, COMPLETE)
        except NotWhole as error:
            raise WorkerLost(str(error)) from None

    def _check(self) -> None:
        if not self._served.service.alive:
            os._exit(1)  # Ray starts another one


class RayWorker:
    """A `workers.Worker` that is an actor; `actor` is Ray's handle of it."""

    def __init__(self, name: str, actor: Any):
        self.name, self.actor = name, actor
        self._version: int | None = None  # of the weights it was given

    async def complete(self, prompt: Sequence[int], sampling: Sampling) -> list[Drawn]:
        return await self._ask(self.actor.complete, list(prompt), sampling, self._version)

    async def update(self, folder: Path, version: int) -> None:
        await self._ask(self.actor.update, str(folder), version)
        self._version = version

    async def _ask(self, method: Any, *args: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return await method.remote(*args)
        except RayTaskError as error:  # raised by the method itself
            cause = error.cause
            if isinstance(cause, (ConfigError, WorkerBusy, WorkerLost)):
                raise cause from None
            raise WorkerLost(f"{type(cause).__name__}: {cause}") from None
        except RayError as error:
            raise WorkerLost(_line(error)) from None


@contextlib.contextmanager
def ray_workers(
    config: ServeConfig, count: int, *, address: str = "", gpus: float = 0.0
) -> Iterator[list[RayWorker]]:
    """So many actors, with their models, on the cluster at `address`; their end is theirs, too.

    config: what each serves. address: "auto", or a head node's; empty: RAY_ADDRESS's, or else a
    cluster of this host alone, which ends with the context. gpus: of each actor.
    Raises ConfigError where Ray is not installed, has no place for them, or they cannot be started.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('config.rollout.ray_workers needs Ray: pip install "jaxrl[ray]"')
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # actors find what we find
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = address or "this host"
            raise ConfigError(f"no Ray cluster at {where}: {_line(error)}") from None
    actors = []
    try:
        # The driver's own share of its GPUs is not an actor's.
        memory = {"XLA_CLIENT_MEM_FRACTION": f"{MEMORY_FRACTION * min(gpus, 1):.3f}"}
        environment = {"env_vars": memory} if gpus else {}
        remote = ray.remote(num_gpus=gpus, max_restarts=-1, runtime_env=environment)(EngineActor)
        actors += [remote.remote(config) for _ in range(count)]
        _wait(ray, actors, gpus)
        yield [RayWorker(f"ray-{i}", actor) for i, actor in enumerate(actors)]
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _wait(ray: Any, actors: Sequence[Any], gpus: float) -> None:
    deadline = time.monotonic() + START_S
    for actor in actors:
        try:
            ray.get(actor.process.remote(), timeout=max(deadline - time.monotonic(), 0.0))
        except ray.exceptions.GetTimeoutError:
            there = ray.cluster_resources()
            raise ConfigError(
                f"the Ray cluster has not started {len(actors)} rollout workers of {gpus:g} GPUs "
                f"within {START_S:g} s; it has {there.get('CPU', 0):g} CPUs and "
                f"{there.get('GPU', 0):g} GPUs"
            ) from None
        except ray.exceptions.RayError as error:
            raise ConfigError(f"a rollout worker cannot be started: {_line(error)}") from None


def _line(error: Exception) -> str:
    """The last line of what Ray tells, which is the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
