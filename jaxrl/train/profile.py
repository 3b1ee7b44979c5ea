"""A trace of some steps of a run."""

import os

import jax

from jaxrl.parallel.distributed import is_reporter


class Profile:
    """Traces `steps` ("FIRST:LAST", or "" for none) into `folder`, for TensorBoard's profiler. Use
    as a context manager; processes other than the first trace nothing."""

    def __init__(self, steps: str, folder: str | os.PathLike):
        first, _, last = steps.partition(":")
        self.first, self.last = (int(first), int(last)) if last else (-1, -1)
        self.folder, self.on = folder, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int) -> None:
        if step == self.first and is_reporter():
            with jax.transfer_guard("allow"):
                jax.profiler.start_trace(str(self.folder))
            self.on = True

    def ends(self, step: int) -> bool:
        return self.on and step == self.last

    def after(self, step: int) -> None:
        if self.ends(step):
            self._stop()

    def _stop(self) -> None:
        if self.on:
            with jax.transfer_guard("allow"):
                jax.profiler.stop_trace()
        self.on = False
