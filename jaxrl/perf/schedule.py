"""Which of a scheduled program's transfers run beside compute, read from `compiled.as_text()`.

XLA writes a scheduled module's instructions in the order in which they are launched, so what stands
between the start and the done of a collective runs beside it. How long that takes is estimated
(`roofline`), and the whole schedule is played through once: compute in order, transfers one after
the other on a queue of their own, a done waiting for its transfer.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable

from jaxrl.perf import hlo
from jaxrl.perf.hardware import Gpu
from jaxrl.perf.hlo_text import Instruction, branches, bytes_of
from jaxrl.perf.roofline import KernelFlops, Roofline

# Compute hides a transfer when it takes at least this share of the transfer's time: with less, the
# step would wait for most of it, whatever stands between its start and its done.
COVER = 0.5

# The `op_name` of what the layers gather and scatter: not of the tokens that visit the vocabulary's
# shards, in the head and in the embedding.
WEIGHTS = r"^(?!.*/(head|embed)/)"

_ALIASES = ("bitcast", "get-tuple-element", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """One collective of the program, and what runs beside it.

    bytes: per device and call, of the gathered or not yet scattered arrays. compute_seconds: what
    stands between start and done in the schedule. transfer_seconds: at NVLink's bandwidth.
    exposed_seconds: how long compute waits for it when the schedule is played through. All of one
    call, estimated; a loop of unknown length counts as one iteration.
    """

    kind: str
    op_name: str
    bytes: int
    calls: int
    is_async: bool
    compute_seconds: float
    transfer_seconds: float
    exposed_seconds: float

    @property
    def covered(self) -> bool:
        """Whether real compute, `COVER` of the transfer's time, stands between start and done."""
        return self.is_async and self.compute_seconds >= COVER * self.transfer_seconds


def overlap(text: str, gpu: Gpu, *, kernel_flops: KernelFlops | None = None) -> tuple[Overlap, ...]:
    """Every collective of a scheduled program, in the order of its schedule.

    Raises ValueError where `text` is not a scheduled HLO module, or where the start of a transfer
    cannot be found.
    """
    if "is_scheduled=true" not in text[: text.find("\n")]:
        raise ValueError("the module is not scheduled; use the text of a compiled program")
    module = hlo.Module(text)
    player = _Player(module, Roofline(module, gpu, kernel_flops))
    player.play(module.entry, 1, {})
    return tuple(player.found)


def overlapped_fraction(
    overlaps: Iterable[Overlap], kind: str = "all-gather", where: str = WEIGHTS
) -> float:
    """The share of the bytes of all `kind` collectives that are `covered`; 1.0 without any.

    where: a pattern that the `op_name` of those to look at must match, by default the layers'.
    """
    return _fraction(overlaps, kind, where, lambda o: o.covered)


def hidden_fraction(
    overlaps: Iterable[Overlap], kind: str = "all-gather", where: str = WEIGHTS
) -> float:
    """The share of their transfer time, by bytes, for which nothing waits; 1.0 without any."""
    return _fraction(overlaps, kind, where, lambda o: 1 - o.exposed_seconds / o.transfer_seconds)


def _fraction(overlaps, kind: str, where: str, weigh: Callable[[Overlap], float]) -> float:
    chosen = [o for o in overlaps if o.kind == kind and re.search(where, o.op_name) and o.bytes]
    total = sum(o.bytes * o.calls for o in chosen)
    return sum(weigh(o) * o.bytes * o.calls for o in chosen) / total if total else 1.0


@dataclasses.dataclass
class _Flight:
    """A transfer that has been started: when it ends, the compute done when it was, and for how
    long of its own time something has waited."""

    kind: str
    op_name: str
    bytes: int
    seconds: float
    end: float
    work: float
    waited: float = 0.0


class _Player:
    """Plays the schedule. `now`: the clock; `work`: compute since the start, without waiting."""

    def __init__(self, module: hlo.Module, roofline: Roofline):
        self.module, self.roofline = module, roofline
        self.now = self.work = self.network_free = 0.0
        self.found: list[Overlap] = []
        self.flying: list[_Flight] = []

    def play(self, computation: str, calls: int, carried: dict[int, _Flight]) -> dict:
        """Run a computation. carried: transfers in flight, by element of its parameter. Returns
        those in flight at its end, by element of its result."""
        table = self.module.computations[computation]
        flights: dict[str, _Flight | dict[int, _Flight]] = {}
        for i in table.values():
            if i.op == "parameter":
                if carried:
                    flights[i.name] = carried
            elif i.op == "tuple":
                inside = {k: flights.get(n) for k, n in enumerate(i.operands())}
                flights[i.name] = {k: f for k, f in inside.items() if isinstance(f, _Flight)}
            elif i.op in _ALIASES:
                source = flights.get(i.operands()[0])
                if i.op == "get-tuple-element":
                    source = source.get(i.index) if isinstance(source, dict) else None
                if source is not None:
                    flights[i.name] = source
            elif i.op == "while":
                initial = flights.get(i.operands()[0])
                flights[i.name] = self._loop(i, calls, initial if isinstance(initial, dict) else {})
            elif i.op == "call":
                self.play(i.computation("to_apply"), calls, {})
            elif i.op == "conditional":
                self._choose(i, calls)
            elif i.op.endswith("-done"):
                self._finish(i, flights.get(i.operands()[0]), calls)
            elif sent := self._transfer(i, table):
                kind, size = sent
                seconds = self.roofline.transfer_seconds(kind, size)
                end = max(self.now, self.network_free) + seconds
                self.network_free = end
                flight = _Flight(kind, i.op_name, size, seconds, end, self.work)
                self.flying.append(flight)
                if i.op.endswith("-start") and '"is_sync":true' not in i.rest:
                    flights[i.name] = flight
                else:
                    self._wait(flight, calls, is_async=False)
                    flights[i.name] = {}  # its done, if it has one, has nothing to wait for
            else:
                seconds = self.roofline.seconds(i, table)
                self.now += seconds
                self.work += seconds
        out = flights.get(self.module.roots[computation])
        return out if isinstance(out, dict) else {}

    def _loop(self, i: Instruction, calls: int, initial: dict[int, _Flight]) -> dict:
        """Two iterations stand for all: the second starts as every later one does."""
        body, trips, keep = i.computation("body"), i.trips or 1, len(self.found)
        carried = self.play(body, calls, initial)
        if trips == 1:
            return carried
        del self.found[keep:]
        now, work = self.now, self.work
        carried = self.play(body, calls * trips, carried)
        later, more = (trips - 2) * (self.now - now), (trips - 2) * (self.work - work)
        self.now += later
        self.network_free += later
        self.work += more
        return {
            k: dataclasses.replace(f, end=f.end + later, work=f.work + more)
            for k, f in carried.items()
        }

    def _choose(self, i: Instruction, calls: int) -> None:
        """Every branch is reported; the clock goes on from the one that ends first."""
        before, ends = (self.now, self.work, self.network_free), []
        for name in branches(i):
            self.now, self.work, self.network_free = before
            self.play(name, calls, {})
            ends.append((self.now, self.work, self.network_free))
        self.now, self.work, self.network_free = min(ends)

    def _transfer(self, i: Instruction, table) -> tuple[str, int] | None:
        """(kind, bytes) of an instruction that is, starts, or wraps a collective."""
        kind = i.op.removesuffix("-start")
        if kind in hlo.COLLECTIVES:
            read = sum(bytes_of(table[name].shape) for name in i.operands())
            wrote = bytes_of(i.shape)
            if kind != i.op and kind != "all-reduce":
                wrote -= read  # a start's shape lists its operands too
            return kind, max(read, wrote)
        if kind not in ("async", "fusion"):
            return None
        inside = self.module.counts(i.computation("calls")).collectives
        if not inside:
            return None
        return next(iter(inside))[0], sum(size * n for (_, size, _), n in inside.items())

    def _finish(self, i: Instruction, flight, calls: int) -> None:
        if isinstance(flight, _Flight):
            self._wait(flight, calls, is_async=True)
        elif flight is None and i.op.removesuffix("-done") in hlo.COLLECTIVES:
            raise ValueError(f"{i.name} ends a transfer whose start is not found")

    def _wait(self, flight: _Flight, calls: int, *, is_async: bool) -> None:
        if flight.end > self.now:
            # Those before it in the queue are waited for too.
            for f in self.flying:
                f.waited += max(0.0, min(f.end, flight.end) - max(f.end - f.seconds, self.now))
            self.now = flight.end
        self.flying = [f for f in self.flying if f is not flight and f.end > self.now]
        self.found.append(
            Overlap(
                kind=flight.kind,
                op_name=flight.op_name,
                bytes=flight.bytes,
                calls=calls,
                is_async=is_async,
                compute_seconds=self.work - flight.work,
                transfer_seconds=flight.seconds,
                exposed_seconds=min(flight.waited, flight.seconds),
            )
        )
