"""How long an instruction of a compiled program takes at least: its FLOPs at the GPU's peak, or its
bytes at the memory's bandwidth, whichever is longer. A lower bound, made to weigh compute against
transfers, not to predict a step's time."""

import functools
from collections.abc import Callable

from jaxrl.perf import hlo
from jaxrl.perf.hardware import Gpu
from jaxrl.perf.hlo_text import Instruction, branches, bytes_of, shapes_of, size_of

# FLOPs of one run of a kernel that the text does not tell (Mosaic, cuDNN); None: only its bytes.
type KernelFlops = Callable[[hlo.CallSite], float | None]

# They move nothing: names for what is there, or the end of what began elsewhere.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_SLICES = ("dynamic-slice", "gather", "slice")
_VIEWS = ("bitcast", "copy", "convert", "reshape", "transpose")


class Roofline:
    """Seconds that the instructions of `module` take on `gpu`, collectives left out."""

    def __init__(self, module: hlo.Module, gpu: Gpu, kernel_flops: KernelFlops | None = None):
        self.module, self.gpu, self.kernel_flops = module, gpu, kernel_flops
        self.computation_seconds = functools.cache(self._computation_seconds)

    def transfer_seconds(self, kind: str, size: int) -> float:
        """A collective of `size` bytes over NVLink, one direction; no latency."""
        passes = 2 if kind == "all-reduce" else 1  # reduce and scatter, then gather
        return passes * size / (self.gpu.nvlink_bandwidth / 2)

    def _computation_seconds(self, name: str) -> float:
        table = self.module.computations[name]
        return sum(self.seconds(i, table) for i in table.values())

    def seconds(self, i: Instruction, table: dict[str, Instruction]) -> float:
        """One run of an instruction. A loop of unknown length counts once, a conditional as its
        shortest branch: what is certain to run."""
        base = i.op.removesuffix("-start")
        if i.op in _FREE or i.op.endswith("-done") or base in hlo.COLLECTIVES:
            return 0.0
        if i.op == "while":
            return (i.trips or 1) * self.computation_seconds(i.computation("body"))
        if i.op == "call":
            return self.computation_seconds(i.computation("to_apply"))
        if i.op == "conditional":
            return min(self.computation_seconds(b) for b in branches(i))
        if base == "async":
            return self.computation_seconds(i.computation("calls"))
        if i.op == "copy-start":  # to or from the host's memory, by an engine of its own
            return 0.0
        counts = self.module.count(i, table)
        if counts.collectives:  # a collective that is written as a fusion
            return 0.0
        return max(
            self._flops(counts) / self.gpu.bf16_flops,
            self._traffic(i, table) / self.gpu.memory_bandwidth,
        )

    def _flops(self, counts: hlo.Counts) -> float:
        summary = counts.summary()
        total = float(summary.flops)
        for call in summary.call_sites:
            told = self.kernel_flops(call) if self.kernel_flops else None
            total += call.count * (call.flops or 0 if told is None else told)
        return total

    def _traffic(self, i: Instruction, table) -> int:
        """Bytes read and written; of an array that is only sliced or updated in place, the part."""
        operands = [table[name] for name in i.operands()]
        if i.op.removesuffix("-start") == "fusion":
            return self._fusion_traffic(i.computation("calls"))
        if i.op in _SLICES:
            return 2 * bytes_of(i.shape)
        if i.op == "dynamic-update-slice":
            return 2 * bytes_of(operands[1].shape)
        if i.op == "custom-call":  # scratch (s8, u8) is not data
            data = [
                s for o in (*operands, i) for s in shapes_of(o.shape) if s[0] not in ("s8", "u8")
            ]
            return sum(map(size_of, data))
        return bytes_of(i.shape) + sum(bytes_of(o.shape) for o in operands)

    def _fusion_traffic(self, name: str) -> int:
        table = self.module.computations[name]
        users: dict[str, list[Instruction]] = {n: [] for n in table}
        for i in table.values():
            for operand in i.operands() if i.op not in ("parameter", "constant") else ():
                users[operand].append(i)

        def read(i: Instruction, depth: int = 0) -> int:
            """Bytes of `i` that its users look at."""
            whole = bytes_of(i.shape)
            total = 0
            for user in users[i.name]:
                if user.op in _SLICES and user.operands()[0] == i.name:
                    total += bytes_of(user.shape)
                elif user.op == "dynamic-update-slice" and user.operands()[0] == i.name:
                    continue  # written into, not read
                elif user.op in _VIEWS and users[user.name] and depth < 8:
                    total += read(user, depth + 1)
                else:
                    return whole
            return min(total, whole)

        def written(i: Instruction) -> int:
            if i.op == "tuple":
                return sum(written(table[n]) for n in i.operands())
            if i.op == "dynamic-update-slice":
                return bytes_of(table[i.operands()[1]].shape)
            if i.op == "bitcast":
                return written(table[i.operands()[0]])
            return bytes_of(i.shape)

        reads = sum(read(i) for i in table.values() if i.op == "parameter")
        return reads + written(table[self.module.roots[name]])
