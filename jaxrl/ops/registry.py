"""Which implementation of an op runs: decided once, by name, for a GPU, a dtype and a shape.

A kernel that no GPU has run is not a default. `auto` takes, in the op's order of preference, the
first implementation that can run and is validated on the target: by its authors (cuDNN, tokamax),
unless our tests have failed there, or by our tests (`pytest -m gpu`, which writes
`jaxrl_kernels/validated.json`). A request by name
that cannot be met raises; one for a kernel of ours not yet validated there works and says so. On a
GPU, `auto` does not fall back to what is no kernel while one of ours could run: it raises, for its
user to choose between them.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxrl_kernels.validated import has_failed, is_validated

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
    `plain`: no kernel but loops of XLA's products, which suit a CPU; a GPU is many times slower.
    """

    name: str
    make: Callable[[Target], Callable]
    why_not: Callable[..., str | None]
    ours: bool = False
    plain: bool = False


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
        name, for a request that cannot be met, with what could run instead, and where "auto" would
        take a `plain` one on a GPU that a kernel of ours could run on.
        """
        if name not in self.names:
            raise ConfigError(f"unknown {self.name} {name!r}; one of {', '.join(self.names)}")
        why_not = {i.name: i.why_not(target, **case) for i in self.implementations}
        can = [i for i in self.implementations if why_not[i.name] is None]
        if name == "auto":
            chosen = next(i for i in can if i.name not in self.never_auto and self._sure(i, target))
            if chosen.plain and target.backend == "gpu":
                self._no_kernel(chosen.name, target, why_not)
            return chosen.name, chosen.make(target)
        if why_not[name] is not None:
            others = [repr(i.name) for i in can if i.name not in self.never_auto]
            raise ConfigError(f"{self.name} {name!r} {why_not[name]}; use {' or '.join(others)}")
        chosen = next(i for i in can if i.name == name)
        if not self._sure(chosen, target):
            _say_once(
                f"{self.name} {name!r} is not validated on {target.gpu}: its tests have not run "
                "there (pytest -m gpu)"
            )
        return name, chosen.make(target)

    def _no_kernel(self, plain: str, target: Target, why_not: dict[str, str | None]) -> None:
        reasons = "; ".join(f"{name!r} {said}" for name, said in why_not.items() if said)
        because = f" ({reasons})" if reasons else ""
        if ours := [i.name for i in self.implementations if i.ours and why_not[i.name] is None]:
            raise ConfigError(
                f"{self.name} 'auto' finds no kernel that is known to work on {target}{because}; "
                f"use {ours[0]!r}, whose tests have not run there (pytest -m gpu), or {plain!r}, "
                "which is many times slower"
            )
        _say_once(f"{self.name} {plain!r} on {target}, many times slower than a kernel{because}")

    def _sure(self, implementation: Implementation, target: Target) -> bool:
        kernel = f"{self.name} {implementation.name}"
        if implementation.ours:
            return is_validated(kernel, target.gpu)
        return implementation.plain or not has_failed(kernel, target.gpu)


@functools.cache
def _say_once(line: str) -> None:
    log.warning(line)
