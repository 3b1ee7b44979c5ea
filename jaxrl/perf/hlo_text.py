"""The text of an HLO module taken apart: computations, their instructions, shapes and sizes."""

import dataclasses
import functools
import math
import re

type Shape = tuple[str, tuple[int, ...]]  # ("bf16", (2048, 512))


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `name = shape op(rest`."""

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
        """The computation that the attribute `key` names, or ""."""
        return self.attribute(rf"\b{key}=%?([\w.\-]+)")

    @property
    def trips(self) -> int | None:
        """How often a `while` runs its body; None where the compiler does not know."""
        count = self.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        return int(count) if count else None

    @property
    def index(self) -> int:
        """Which element a `get-tuple-element` takes, or which parameter this one is."""
        return int(self.attribute(r"\bindex=(\d+)") or self.attribute(r"^(\d+)\)"))

    @property
    def op_name(self) -> str:
        return self.attribute(r'op_name="([^"]*)"')


class ModuleText:
    """The computations of a module, each a name -> instruction table in program order.

    Raises ValueError where the text is no HLO module. `roots`: what each computation returns.
    """

    # A shape holds no " word(", so the first one is the opcode.
    _LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
    _HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        name = ""
        table: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line[:1] in (" ", "\t"):
                if match := self._LINE.match(line):
                    table[match[2]] = Instruction(*match.groups()[1:])
                    if match[1]:
                        self.roots[name] = match[2]
            elif not line.startswith("HloModule") and (match := self._HEAD.match(line)):
                name = match[2]
                table = self.computations.setdefault(name, {})
                if match[1]:
                    self.entry = match[2]
        if not self.entry:
            raise ValueError("no ENTRY computation: this is not the text of an HLO module")


def branches(i: Instruction) -> list[str]:
    """The computations that a conditional chooses from."""
    listed = i.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return re.findall(r"[\w.\-]+", listed)
    return [i.computation("true_computation"), i.computation("false_computation")]


def dims_of(i: Instruction, key: str) -> list[int]:
    """`rhs_batch_dims={0,1}` of a dot, or `"rhs_batch_dimensions":["0","1"]` of a GEMM call."""
    listed = i.attribute(rf'\b{key}(?:s=\{{|ensions":\[)([^\}}\]]*)')
    return [int(n) for n in re.findall(r"\d+", listed)]


@functools.lru_cache(maxsize=65536)
def shapes_of(text: str) -> list[Shape]:
    """Every array in a (tuple) shape as text; layouts and `/*index=5*/` are skipped."""
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    ]


def size_of(shape: Shape) -> int:
    """Bytes of one array."""
    dtype, dims = shape
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
    return math.ceil(math.prod(dims) * bits / 8)


def bytes_of(text: str) -> int:
    """Bytes of every array in a (tuple) shape as text."""
    return sum(size_of(shape) for shape in shapes_of(text))
