"""What a compiled program does, read from its optimized HLO text (`compiled.as_text()`).

XLA's own cost analysis counts a loop's body once and custom calls as nothing; here every matrix
product counts as often as it runs. Works on programs compiled for CPU and for GPU.

Not seen: products that XLA turned into multiply-and-reduce (matrix times one vector), and what a
custom call other than a GEMM does inside (`call_sites` lists those, for declared FLOPs to be
added).
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator

from jaxrl.perf.hlo_text import (
    Instruction,
    ModuleText,
    Shape,
    branches,
    bytes_of,
    dims_of,
    shapes_of,
    size_of,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
GEMM_TARGETS = ("__cublas$gemm", "__cublas$lt$matmul")  # and the latter's $f8
_LIBRARY_FUSION = '"fusion_config":{"kind":"__ynn_fusion"'
_DECLARED_FLOPS = r'cost_estimate_json = "\{[^}]*\\22flops\\22: (\d+)'
UNCOUNTED = ("convolution", "ragged-dot", "scaled-dot")


@dataclasses.dataclass(frozen=True)
class CallSite:
    """A custom call: its target, where it comes from (`op_name`), operand shapes, times it runs.

    flops: of one run, where the call declares them (`cost_estimate_json`: jax-triton), else None.
    """

    target: str
    op_name: str
    operands: tuple[Shape, ...]
    flops: int | None
    count: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """`bytes` per device and call: of the gathered, or not yet scattered, arrays.

    `is_async`: it has a start and a done, and runs beside what stands between them.
    """

    kind: str
    bytes: int
    calls: int
    is_async: bool


@dataclasses.dataclass(frozen=True)
class LoopBody:
    """A loop whose trip count is not known at compile time: one iteration of it.

    `runs`: how often the loop as a whole runs. Nothing of it is in the summary that lists it.
    """

    op_name: str
    runs: int
    iteration: "HloSummary"


@dataclasses.dataclass(frozen=True)
class HloArray:
    """An array that the program holds in memory; `op_name` of the first instruction that makes it.

    The insides of a fusion are not held, but those that a CPU library runs may be, and are listed.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class HloSummary:
    """One run of a program on one device.

    flops: of all matrix products, a multiply and an add counting 2, loops multiplied out; of a
    conditional the branch with the most. custom_calls: runs by target. uncounted: runs of other
    instructions that multiply matrices. largest_arrays: distinct shapes, largest first.
    """

    flops: int
    custom_calls: collections.Counter[str]
    call_sites: tuple[CallSite, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[LoopBody, ...]
    uncounted: collections.Counter[str]
    largest_arrays: tuple[HloArray, ...] = ()


def summarize(text: str, *, largest: int = 50) -> HloSummary:
    """Read an HLO module. `largest`: how many shapes to keep in `largest_arrays`.

    Raises ValueError where `text` is no HLO module.
    """
    module = Module(text)
    return module.counts(module.entry).summary(tuple(module.arrays())[:largest])


class Counts:
    """A summary under construction: counters that can be added up with a factor."""

    def __init__(self):
        self.flops = 0
        self.calls: collections.Counter[tuple] = collections.Counter()
        self.collectives: collections.Counter[tuple] = collections.Counter()
        self.uncounted: collections.Counter[str] = collections.Counter()
        self.loops: list[LoopBody] = []

    def add(self, other: "Counts", times: int = 1) -> None:
        self.flops += times * other.flops
        for name in ("calls", "collectives", "uncounted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, count in theirs.items():
                mine[key] += times * count
        if times:
            self.loops += [dataclasses.replace(x, runs=x.runs * times) for x in other.loops]

    def as_async(self) -> "Counts":
        """The same, with every collective asynchronous: what an `async-start` wraps."""
        counts = Counts()
        counts.add(self)
        counts.collectives.clear()
        for (kind, size, _), calls in self.collectives.items():
            counts.collectives[kind, size, True] += calls
        return counts

    def summary(self, arrays: tuple[HloArray, ...] = ()) -> HloSummary:
        targets: collections.Counter[str] = collections.Counter()
        for (target, *_), count in self.calls.items():
            targets[target] += count
        return HloSummary(
            flops=self.flops,
            custom_calls=targets,
            call_sites=tuple(CallSite(*key, count=n) for key, n in self.calls.items()),
            collectives=tuple(
                Collective(kind, size, calls, is_async)
                for (kind, size, is_async), calls in self.collectives.items()
            ),
            unknown_loops=tuple(self.loops),
            uncounted=self.uncounted,
            largest_arrays=arrays,
        )


class Module(ModuleText):
    """A module's text, with what its computations do."""

    def __init__(self, text: str):
        super().__init__(text)
        self.counts = functools.cache(self._counts)

    def _counts(self, computation: str) -> Counts:
        total = Counts()
        table = self.computations[computation]
        for i in table.values():
            self._count(total, i, table)
        return total

    def count(self, i: Instruction, table: dict[str, Instruction]) -> Counts:
        """What one instruction of a computation does, with everything that it calls."""
        counts = Counts()
        self._count(counts, i, table)
        return counts

    def _count(self, total: Counts, i: Instruction, table) -> None:
        op = i.op.removesuffix("-start")
        if op == "dot":
            total.flops += self._dot(i, table)
        elif op == "custom-call":
            self._custom_call(total, i, table)
        elif op in ("fusion", "async"):
            inside = self.counts(i.computation("calls"))
            total.add(inside if i.op == "fusion" else inside.as_async())
        elif op == "call":
            total.add(self.counts(i.computation("to_apply")))
        elif op == "while":
            body = self.counts(i.computation("body"))
            if i.trips is None:
                total.loops.append(LoopBody(i.op_name, 1, body.summary()))
            else:
                total.add(body, i.trips)
        elif op == "conditional":
            choices = [self.counts(name) for name in branches(i)]
            total.add(max(choices, key=lambda c: c.flops))
        elif op in UNCOUNTED:
            total.uncounted[op] += 1
        elif i.op in COLLECTIVES or i.op.removesuffix("-done") in COLLECTIVES:
            total.collectives[self.collective(i, table)] += 1

    def _custom_call(self, total: Counts, i: Instruction, table) -> None:
        target = i.attribute(r'custom_call_target="([^"]*)"')
        shapes = tuple(s for name in i.operands() for s in shapes_of(table[name].shape))
        declared = i.attribute(_DECLARED_FLOPS)
        total.calls[target, i.op_name, shapes, int(declared) if declared else None] += 1
        if target.startswith(GEMM_TARGETS):
            total.flops += self._dot(i, table)

    def _dot(self, i: Instruction, table) -> int:
        """2 x (all dimensions of the left side) x (dimensions only the right side has)."""
        (_, left), (_, right) = (shapes_of(table[name].shape)[0] for name in i.operands()[:2])
        shared = {*dims_of(i, "rhs_contracting_dim"), *dims_of(i, "rhs_batch_dim")}
        if not shared:
            raise ValueError(f"no dimension numbers on the matrix product {i.name}")
        own = (n for axis, n in enumerate(right) if axis not in shared)
        return 2 * math.prod(left) * math.prod(own)

    def collective(self, i: Instruction, table) -> tuple[str, int, bool]:
        """(kind, bytes, whether asynchronous) of a collective, or of the done of one."""
        start = i
        if i.op.endswith("-done"):
            start = table[i.operands()[0]]
        read = sum(bytes_of(table[name].shape) for name in start.operands())
        is_async = start is not i and '"is_sync":true' not in start.rest
        return i.op.removesuffix("-done"), max(read, bytes_of(i.shape)), is_async

    def arrays(self) -> Iterator[HloArray]:
        """Distinct shapes that exist in memory, largest first: not what is inside a fusion, except
        of CPU libraries, whose scratch memory is not known."""
        found: dict[Shape, str] = {}
        todo, seen = [self.entry], {self.entry}
        while todo:
            for i in self.computations[todo.pop()].values():
                inside = set()
                if i.op == "while":
                    inside = {i.computation("body"), i.computation("condition")}
                elif i.op == "call":
                    inside = {i.computation("to_apply")}
                elif i.op == "async-start" or _LIBRARY_FUSION in i.rest:
                    inside = {i.computation("calls")}
                elif i.op == "conditional":
                    inside = set(branches(i))
                todo += inside - seen
                seen |= inside
                for shape in shapes_of(i.shape):
                    found.setdefault(shape, i.op_name)
        arrays = [HloArray(*shape, size_of(shape), name) for shape, name in found.items()]
        return iter(sorted(arrays, key=lambda a: -a.bytes))
