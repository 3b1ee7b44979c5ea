"""How many bytes of gathered weights a scheduled program holds at once: none, one layer's, or more
(a gather ahead of its use)."""

import re

from jaxrl.perf import hlo
from jaxrl.perf.hlo_text import Instruction, bytes_of, shapes_of, size_of
from jaxrl.perf.schedule import WEIGHTS

# What passes an array on without a new buffer. A copy is one more buffer, of the same weights.
_ALIASES = ("bitcast", "opt-barrier")

# A buffer: what made it, and its bytes.
type _Buffers = dict[str, int]


def layers_ahead(text: str, layer_bytes: int, where: str = WEIGHTS) -> float:
    """Layers whose gathered weights are alive besides the one that is being computed.

    layer_bytes: of one layer's gathered weights, in the dtype in which they are gathered. 0 where
    each layer's gathers serve that layer only; up to 1 with the next layer's underway.
    """
    return max(0.0, gathered_alive(text, where) / layer_bytes - 1.0)


def gathered_alive(text: str, where: str = WEIGHTS) -> int:
    """The most bytes of gathered arrays that are alive at one point of the schedule.

    An array lives from its gather's start to its last use; one that a loop carries or is given
    lives through it. where: a pattern for the gathers' `op_name`.
    """
    module = hlo.Module(text)
    return _Liveness(module, where).most(module.entry, {})


class _Liveness:
    def __init__(self, module: hlo.Module, where: str):
        self.module, self.where = module, re.compile(where)

    def most(self, computation: str, given: dict[int, int]) -> int:
        """Bytes alive at the worst point of a computation. given: bytes of those elements of its
        parameter that hold gathered arrays; they live as long as they are used, and no less than
        their caller holds them (which counts them where the loop only reads them)."""
        table = self.module.computations[computation]
        order = {name: k for k, name in enumerate(table)}
        holds = self._holds(table, given)
        born = {b: order.get(b.partition("/")[0], 0) for held in holds.values() for b in held}
        size = {b: n for held in holds.values() for b, n in held.items()}
        last = dict(born)
        inner: dict[int, int] = {}
        for i in table.values():
            for name in _operands(i):
                for buffer in holds.get(name, ()):
                    last[buffer] = max(last[buffer], order[i.name])
            inside = self._inside(i, table, holds)
            if inside:
                inner[order[i.name]] = inside
        for buffer in holds.get(self.module.roots[computation], ()):
            last[buffer] = len(order)
        points = {*born.values(), *inner}
        return max(
            (
                inner.get(k, 0) + sum(n for b, n in size.items() if born[b] <= k <= last[b])
                for k in points
            ),
            default=0,
        )

    def _inside(self, i: Instruction, table, holds: dict[str, _Buffers]) -> int:
        """What a called computation holds on top of what it is given."""
        if i.op == "while":
            body = i.computation("body")
            given = self._elements(table[i.operands()[0]], holds)
            # What an iteration hands to the next one, whatever the first one found there.
            inside = self.module.computations[body]
            handed = self._elements(inside[self.module.roots[body]], self._holds(inside, given))
            return max(0, self.most(body, given | handed) - sum(given.values()))
        if i.op == "call":
            return self.most(i.computation("to_apply"), {})
        return 0

    def _elements(self, i: Instruction, holds: dict[str, _Buffers]) -> dict[int, int]:
        """Bytes of gathered arrays by element of a tuple."""
        if i.op != "tuple":
            return {}
        held = {k: holds.get(name) for k, name in enumerate(i.operands())}
        return {k: sum(b.values()) for k, b in held.items() if b}

    def _holds(self, table, given: dict[int, int]) -> dict[str, _Buffers]:
        """The gathered buffers behind each instruction."""
        holds: dict[str, _Buffers] = {}
        for i in table.values():
            operands = _operands(i)
            first = holds.get(operands[0], {}) if operands else {}
            if i.op == "parameter" and given:
                holds[i.name] = {f"{i.name}/{k}": n for k, n in given.items()}
            elif i.op == "get-tuple-element":
                holds[i.name] = _element(first, i, table, holds)
            elif i.op in _ALIASES:
                holds[i.name] = first
            elif i.op == "tuple":
                holds[i.name] = {b: n for name in operands for b, n in holds.get(name, {}).items()}
            elif i.op == "while":
                # What goes in comes out, or is replaced by as much.
                holds[i.name] = first
            elif i.op == "all-gather-done" or (i.op == "async-done" and first):
                holds[i.name] = first
            elif i.op == "copy" and first:
                holds[i.name] = {i.name: bytes_of(i.shape)}
            elif self._gathers(i):
                shapes = shapes_of(i.shape)
                if i.op.endswith("-start"):
                    shapes = shapes[len(operands) :]  # behind its operands
                holds[i.name] = {f"{i.name}/{k}": size_of(s) for k, s in enumerate(shapes)}
        return {name: held for name, held in holds.items() if held}

    def _gathers(self, i: Instruction) -> bool:
        if not self.where.search(i.op_name):
            return False
        if i.op == "async-start":
            inside = self.module.counts(i.computation("calls")).collectives
            return any(kind == "all-gather" for kind, *_ in inside)
        return i.op in ("all-gather", "all-gather-start")


def _element(buffers: _Buffers, i: Instruction, table, holds: dict[str, _Buffers]) -> _Buffers:
    """Those of the buffers behind a tuple that are its element `i.index`."""
    source = table[i.operands()[0]]
    if source.op == "while":
        source = table[source.operands()[0]]
    if source.op == "tuple":
        return holds.get(source.operands()[i.index], {})
    return {b: n for b, n in buffers.items() if b.rpartition("/")[2] == str(i.index)}


def _operands(i: Instruction) -> list[str]:
    return [] if i.op in ("parameter", "constant") else i.operands()
