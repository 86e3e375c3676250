"""Bytes that a compiled program moves between a chip and its HBM, read from its optimised HLO.

XLA's own cost analysis is no measure of that on a TPU: a weight that is fetched into the chip's
vector memory ahead of its use counts three times there (read, written, read again), and the body
of a loop once, however often it runs. The text of the program says in which memory every buffer
lies (S(1) and above are on the chip; nothing, or S(0), is HBM) and how often a loop runs.

Kernels count as what they say they cost. Reads through slices and gathers count what they take;
an update in place counts what it writes. Arrays count without the padding of their tiles.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8": 8, "s16": 16, "u16": 16, "bf16": 16,
         "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}  # fmt: skip
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
# They name buffers and move nothing.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "domain",
         "partition-id", "replica-id", "optimization-barrier", "opt-barrier"}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "AssumeGatherIndicesInBound"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}


@dataclasses.dataclass(frozen=True)
class Array:
    size: int
    hbm: bool

    @property
    def cost(self) -> int:
        return self.size if self.hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    root: bool
    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str  # all behind the opcode

    def called(self, attribute: str) -> str:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        assert found, f"{self.opcode} without {attribute}"
        return found[1]


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    def users(self, name: str) -> Iterator[Instruction]:
        return (i for i in self.values() if name in i.operands)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    def parameter(self, number: int) -> Instruction:
        return next(
            i for i in self.values() if i.opcode == "parameter" and i.text.startswith(f"{number})")
        )


def hbm_bytes(hlo: str, *, open_trips: int = 1) -> int:
    """Bytes read and written in HBM by one run of a program, given as `Compiled.as_text()`.

    `open_trips`: how often loops run whose end the data decides. Of the branches of a condition
    the dearest counts (top-p's search of the whole vocabulary, which few steps need).
    """
    return _Traffic(hlo, open_trips).total()


class Program:
    """A compiled program's text, walked with its loops and branches; `cost` is of one instruction.

    What is counted is a subclass's: `leaf`, for all but loops, branches and calls.
    """

    def __init__(self, hlo: str, open_trips: int):
        self.computations: dict[str, Computation] = {}
        self.open_trips = open_trips
        self.entry = ""
        self.known: dict[str, int] = {}
        current = Computation()
        for line in hlo.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = self.computations[header[2]] = Computation()
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                root, name, kind, opcode, text = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", text.split(")", 1)[0]))
                current[name] = Instruction(
                    bool(root), name, tuple(_arrays(kind)), opcode, operands, text
                )

    def total(self) -> int:
        return self.of(self.entry)

    def of(self, name: str) -> int:
        if name not in self.known:
            computation = self.computations[name]
            self.known[name] = sum(self.cost(computation, i) for i in computation.values())
        return self.known[name]

    def cost(self, computation: Computation, it: Instruction) -> int:
        if it.opcode in _FREE or it.opcode.endswith("-done"):
            return 0
        if it.opcode == "while":
            condition = it.called("condition")
            return self.trips(condition) * (self.of(condition) + self.of(it.called("body")))
        if it.opcode == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", it.text)
            branches = (
                re.findall(r"[\w.\-]+", names[1])
                if names
                else [it.called("true_computation"), it.called("false_computation")]
            )
            return max(map(self.of, branches))
        if it.opcode in ("call", "async-start"):
            return self.of(it.called("to_apply" if it.opcode == "call" else "calls"))
        return self.leaf(computation, it)

    def leaf(self, computation: Computation, it: Instruction) -> int:
        raise NotImplementedError

    def trips(self, condition: str) -> int:
        """A loop that counts to a constant compares one number with it, and does nothing else."""
        steps = [i for i in self.computations[condition].values() if i.opcode not in _FREE]
        bounds = [
            int(found[1])
            for i in self.computations[condition].values()
            if i.opcode == "constant" and (found := re.match(r"(\d+)\)", i.text))
        ]
        return bounds[0] if len(steps) == len(bounds) == 1 else self.open_trips


def goes_on(computation: Computation, it: Instruction) -> bool:
    """Whether this is a collective that was begun in another fusion and goes on in this one.

    libtpu lets one run beside other work so: it stands in every fusion from that which starts it
    to that which waits for it.
    """
    if "async_collective_fusion_config" not in it.text:
        return False
    return not any('"AsyncCollectiveStart"' in user.text for user in computation.users(it.name))


class _Traffic(Program):
    def leaf(self, computation: Computation, it: Instruction) -> int:
        operands = [computation[name].arrays for name in it.operands if name in computation]
        reads = [sum(a.cost for a in arrays) for arrays in operands]
        writes = sum(a.cost for a in it.arrays)
        if it.opcode == "custom-call":
            estimate = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', it.text)
            if estimate:
                return int(estimate[1])
            target = re.search(r'custom_call_target="(\w+)"', it.text)
            return 0 if target and target[1] in _FREE_CALLS else sum(reads) + writes
        if it.opcode == "fusion":
            inner = self.computations[it.called("calls")]
            if '"AsyncCollectiveDone"' in inner.root.text:
                return 0
            taken = (
                min(read, self.taken(inner, inner.parameter(n).name)) if read else 0
                for n, read in enumerate(reads)
            )
            return sum(taken) + self.written(inner, it.arrays)
        if it.opcode == "copy-start":
            return reads[0] + it.arrays[0].cost
        if it.opcode.endswith("-start"):  # its type: the operands, the results, a context
            results = it.arrays[sum(map(len, operands)) :]
            if it.opcode.startswith(("slice", "dynamic-slice")):
                return results[0].size * operands[0][0].hbm + results[0].cost
            return sum(reads) + sum(a.cost for a in results)
        if it.opcode in _SLICES:
            return it.arrays[0].size * operands[0][0].hbm + sum(reads[1:]) + writes
        if it.opcode in _UPDATES:
            update = operands[-1 if it.opcode == "scatter" else 1][0]
            return sum(reads[1:]) + update.size * it.arrays[0].hbm
        return sum(reads) + writes

    def taken(self, computation: Computation, name: str) -> int:
        """Bytes that a fused computation reads of a value that comes from HBM."""
        whole = sum(a.size for a in computation[name].arrays)
        total = whole if computation[name].root else 0  # handed on as it is
        for user in computation.users(name):
            first = user.operands[0] == name and name not in user.operands[1:]
            if user.opcode == "tuple" or goes_on(computation, user):  # handed through
                total += 0
            elif user.opcode == "bitcast":
                total += self.taken(computation, user.name)
            elif user.opcode in _SLICES and first:
                total += user.arrays[0].size
            elif user.opcode in _UPDATES and first:
                total += 0
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                numbers = [n for n, operand in enumerate(user.operands) if operand == name]
                total += sum(self.taken(inner, inner.parameter(n).name) for n in numbers)
            else:
                total += whole
        return total

    def written(self, computation: Computation, outputs: tuple[Array, ...]) -> int:
        """Bytes that a fused computation writes to those of its results that lie in HBM."""
        root = computation.root
        roots = [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]
        if len(roots) < len(outputs):  # one operation with several results
            return sum(a.cost for a in outputs)
        total = 0
        for made, output in zip(roots, outputs, strict=True):
            while made.opcode == "bitcast":
                made = computation[made.operands[0]]
            size = output.size
            if made.opcode == "parameter" or goes_on(computation, made):
                continue
            if made.opcode in _UPDATES:
                update = made.operands[-1 if made.opcode == "scatter" else 1]
                size = computation[update].arrays[0].size
            total += size * output.hbm
        return total


def _arrays(kind: str) -> Iterator[Array]:
    """The arrays of a type, those of a tuple in order."""
    for element, dimensions, layout in _ARRAY.findall(kind):
        if element not in _BITS:
            continue
        count = 1
        for dimension in filter(None, dimensions.split(",")):
            count *= int(dimension)
        space = re.search(r"S\((\d+)\)", layout)
        yield Array(-(-count * _BITS[element] // 8), not space or space[1] == "0")
