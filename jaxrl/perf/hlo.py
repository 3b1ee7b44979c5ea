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
import re
from collections.abc import Iterator

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

type Shape = tuple[str, tuple[int, ...]]  # ("bf16", (2048, 512))


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
    module = _Module(text)
    return module.counts(module.entry).summary(tuple(module.arrays())[:largest])


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes, from behind the opening parenthesis

    def operands(self) -> list[str]:
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match[0] == "(" else -1
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[: match.start()])
        raise ValueError(f"instruction {self.name} has no closing parenthesis")

    def attribute(self, pattern: str, default: str = "") -> str:
        match = re.search(pattern, self.rest)
        return match[1] if match else default

    def computation(self, key: str) -> str:
        return self.attribute(rf"\b{key}=%?([\w.\-]+)")

    @property
    def op_name(self) -> str:
        return self.attribute(r'op_name="([^"]*)"')


class _Counts:
    """A summary under construction: counters that can be added up with a factor."""

    def __init__(self):
        self.flops = 0
        self.calls: collections.Counter[tuple] = collections.Counter()
        self.collectives: collections.Counter[tuple] = collections.Counter()
        self.uncounted: collections.Counter[str] = collections.Counter()
        self.loops: list[LoopBody] = []

    def add(self, other: "_Counts", times: int = 1) -> None:
        self.flops += times * other.flops
        for name in ("calls", "collectives", "uncounted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, count in theirs.items():
                mine[key] += times * count
        if times:
            self.loops += [dataclasses.replace(x, runs=x.runs * times) for x in other.loops]

    def as_async(self) -> "_Counts":
        """The same, with every collective asynchronous: what an `async-start` wraps."""
        counts = _Counts()
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


class _Module:
    """The computations of a module, each a name -> instruction table in program order."""

    # A shape holds no " word(", so the first one is the opcode.
    _LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
    _HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        table: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if line[:1] in (" ", "\t"):
                if match := self._LINE.match(line):
                    table[match[1]] = _Instruction(*match.groups())
            elif not line.startswith("HloModule") and (match := self._HEAD.match(line)):
                table = self.computations.setdefault(match[2], {})
                if match[1]:
                    self.entry = match[2]
        if not self.entry:
            raise ValueError("no ENTRY computation: this is not the text of an HLO module")
        self.counts = functools.cache(self._counts)

    def _counts(self, computation: str) -> _Counts:
        total = _Counts()
        table = self.computations[computation]
        for i in table.values():
            op = i.op.removesuffix("-start")
            if op == "dot":
                total.flops += self._dot(i, table)
            elif op == "custom-call":
                self._custom_call(total, i, table)
            elif op == "fusion":
                total.add(self.counts(i.computation("calls")))
            elif op == "async":
                total.add(self.counts(i.computation("calls")).as_async())
            elif op == "call":
                total.add(self.counts(i.computation("to_apply")))
            elif op == "while":
                self._while(total, i)
            elif op == "conditional":
                branches = [self.counts(name) for name in _branches(i)]
                total.add(max(branches, key=lambda c: c.flops))
            elif op in UNCOUNTED:
                total.uncounted[op] += 1
            elif i.op in COLLECTIVES or i.op.removesuffix("-done") in COLLECTIVES:
                total.collectives[self._collective(i, table)] += 1
        return total

    def _while(self, total: _Counts, i: _Instruction) -> None:
        body = self.counts(i.computation("body"))
        trips = i.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if trips:
            total.add(body, int(trips))
        else:
            total.loops.append(LoopBody(i.op_name, 1, body.summary()))

    def _custom_call(self, total: _Counts, i: _Instruction, table) -> None:
        target = i.attribute(r'custom_call_target="([^"]*)"')
        shapes = tuple(s for name in i.operands() for s in _shapes(table[name].shape))
        declared = i.attribute(_DECLARED_FLOPS)
        total.calls[target, i.op_name, shapes, int(declared) if declared else None] += 1
        if target.startswith(GEMM_TARGETS):
            total.flops += self._dot(i, table)

    def _dot(self, i: _Instruction, table) -> int:
        """2 x (all dimensions of the left side) x (dimensions only the right side has)."""
        (_, left), (_, right) = (_shapes(table[name].shape)[0] for name in i.operands()[:2])
        shared = {*_dims(i, "rhs_contracting_dim"), *_dims(i, "rhs_batch_dim")}
        if not shared:
            raise ValueError(f"no dimension numbers on the matrix product {i.name}")
        own = (n for axis, n in enumerate(right) if axis not in shared)
        return 2 * math.prod(left) * math.prod(own)

    def _collective(self, i: _Instruction, table) -> tuple[str, int, bool]:
        start = i
        if i.op.endswith("-done"):
            start = table[i.operands()[0]]
        read = sum(_bytes(table[name].shape) for name in start.operands())
        is_async = start is not i and '"is_sync":true' not in start.rest
        return i.op.removesuffix("-done"), max(read, _bytes(i.shape)), is_async

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
                    inside = set(_branches(i))
                todo += inside - seen
                seen |= inside
                for shape in _shapes(i.shape):
                    found.setdefault(shape, i.op_name)
        arrays = [HloArray(*shape, _size(shape), name) for shape, name in found.items()]
        return iter(sorted(arrays, key=lambda a: -a.bytes))


def _branches(i: _Instruction) -> list[str]:
    listed = i.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return re.findall(r"[\w.\-]+", listed)
    return [i.computation("true_computation"), i.computation("false_computation")]


def _dims(i: _Instruction, key: str) -> list[int]:
    """`rhs_batch_dims={0,1}` of a dot, or `"rhs_batch_dimensions":["0","1"]` of a GEMM call."""
    listed = i.attribute(rf'\b{key}(?:s=\{{|ensions":\[)([^\}}\]]*)')
    return [int(n) for n in re.findall(r"\d+", listed)]


@functools.lru_cache(maxsize=65536)
def _shapes(text: str) -> list[Shape]:
    """Every array in a (tuple) shape as text; layouts and `/*index=5*/` are skipped."""
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    ]


def _size(shape: Shape) -> int:
    dtype, dims = shape
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
    return math.ceil(math.prod(dims) * bits / 8)


def _bytes(text: str) -> int:
    return sum(_size(shape) for shape in _shapes(text))
