"""Which implementation of an op runs: decided once, by name, for a GPU, a dtype and a shape.

A kernel that no GPU has run is not a default. `auto` takes, in the op's order of preference, the
first implementation that can run and is validated on the target: by its authors (cuDNN, tokamax),
or by our tests (`pytest -m gpu`, which writes `jaxrl_kernels/validated.json`). A request by name
that cannot be met raises; one for a kernel of ours not yet validated there works and says so.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxrl_kernels.validated import is_validated

from jaxrl.options import ConfigError

log = logging.getLogger("jaxrl")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is for: "cpu" or "gpu", the GPU's name as the driver gives it
    ("NVIDIA H200"), and its compute capability (90)."""

    backend: str
    gpu: str | None = None
    capability: int = 0

    @classmethod
    def of(cls, device: Any) -> "Target":
        """The target that a JAX device, real or compile-only, is."""
        capability = getattr(device, "compute_capability", None)
        if device.platform == "cpu" or capability is None:
            return cls(device.platform)
        major, _, minor = str(capability).partition(".")
        return cls("gpu", device.device_kind, 10 * int(major) + int(minor or 0))

    @classmethod
    def here(cls) -> "Target":
        """The default device."""
        return cls.of(jax.devices()[0])

    def __str__(self) -> str:
        return f"{self.gpu} (sm_{self.capability})" if self.gpu else self.backend


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    make(target) -> the function. why_not(target, **case) -> a phrase that follows the name ("needs
    an NVIDIA GPU ..."), or None where it can run. `ours`: only validated GPUs count for `auto`.
    """

    name: str
    make: Callable[[Target], Callable]
    why_not: Callable[..., str | None]
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its implementations, those that `auto` prefers first.

    `never_auto`: names that run only by request (the tests' oracle).
    """

    name: str
    implementations: Sequence[Implementation]
    never_auto: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return ("auto", *(i.name for i in self.implementations))

    def resolve(self, name: str, target: Target, **case: Any) -> tuple[str, Callable]:
        """(name, function) of the implementation that `name` stands for on `target`.

        case: what decides whether it can run (dtype, shapes). Raises ConfigError for an unknown
        name, and for a request that cannot be met, with what could run instead.
        """
        if name not in self.names:
            raise ConfigError(f"unknown {self.name} {name!r}; one of {', '.join(self.names)}")
        why_not = {i.name: i.why_not(target, **case) for i in self.implementations}
        can = [i for i in self.implementations if why_not[i.name] is None]
        if name == "auto":
            chosen = next(i for i in can if i.name not in self.never_auto and self._sure(i, target))
            return chosen.name, chosen.make(target)
        if why_not[name] is not None:
            others = [repr(i.name) for i in can if i.name not in self.never_auto]
            raise ConfigError(f"{self.name} {name!r} {why_not[name]}; use {' or '.join(others)}")
        chosen = next(i for i in can if i.name == name)
        if not self._sure(chosen, target):
            _say_not_validated(self.name, name, str(target.gpu))
        return name, chosen.make(target)

    def _sure(self, implementation: Implementation, target: Target) -> bool:
        return not implementation.ours or is_validated(
            f"{self.name} {implementation.name}", target.gpu
        )


@functools.cache
def _say_not_validated(op: str, name: str, gpu: str) -> None:
    log.warning(
        "%s %r is not validated on %s: its tests have not run there (pytest -m gpu)", op, name, gpu
    )
