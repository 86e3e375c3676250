"""What compiled programs take on a chip: memory, work, and the time that the chip's rates allow.

Times are rooflines (Williams et al. 2009): the larger of a program's matmul FLOPs over the chip's
peak and its HBM bytes over the bandwidth. Links between chips, and all that is neither a matmul
nor a kernel's own estimate, are not in them. FLOPs are counted in the traced program, where loops
say how often they run; bytes in the compiled one, see `hlo_bytes`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend

from r1s_jax.run.hlo_bytes import hbm_bytes

_GB = 1e9
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU chip: bytes of HBM that programs get, bytes and bf16 FLOPs a second."""

    name: str
    hbm_bytes: int
    bytes_per_second: float
    flops_per_second: float


# By JAX's name of the device. HBM: what the compiler says is available on one device (its message
# for a program that is too large). Rates: Google Cloud's pages on v5e, v5p and v6e.
CHIPS = {
    "TPU v5 lite": Chip(
        name="v5e",
        hbm_bytes=int(15.75 * _GIB),
        bytes_per_second=819e9,
        flops_per_second=197e12,
    ),
    "TPU v5": Chip(
        name="v5p",
        hbm_bytes=int(95.74 * _GIB),
        bytes_per_second=2765e9,
        flops_per_second=459e12,
    ),
    "TPU v6 lite": Chip(
        name="v6e",
        hbm_bytes=int(31.25 * _GIB),
        bytes_per_second=1640e9,
        flops_per_second=918e12,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A traced program (`jax.jit(f).trace(...)`), ready to be compiled; all numbers per chip.

    beside_bytes: what others hold while it runs. open_trips: how often a loop runs whose end the
    data decides. steps: one run counts as so many, and costs are given for one. tokens: of one
    step. least_bytes: what a step has to read at the least.
    """

    name: str
    traced: Any
    beside_bytes: int = 0
    open_trips: int = 1
    steps: int = 1
    tokens: float = 0.0
    least_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a compiled program takes, per chip; FLOPs and HBM bytes of one step.

    `refusal`: why there is no such program (the compiler ran out of HBM); the rest is zero then.
    """

    program: Program
    compile_seconds: float = 0.0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    peak_bytes: int = 0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    refusal: str = ""

    def seconds(self, chip: Chip) -> float:
        """The roofline time of a step."""
        return max(self.flops / chip.flops_per_second, self.hbm_bytes / chip.bytes_per_second)

    def culprit(self, chip: Chip) -> str:
        """One line if it does not fit the chip, else nothing."""
        name, needed = self.program.name, self.peak_bytes + self.program.beside_bytes
        if self.refusal:
            return f"{name} does not fit: {self.refusal}"
        if needed <= chip.hbm_bytes:
            return ""
        return (
            f"{name} does not fit: {self.peak_bytes / _GB:.2f} GB, and "
            f"{self.program.beside_bytes / _GB:.2f} GB beside it, on a {chip.name} chip with "
            f"{chip.hbm_bytes / _GB:.2f} GB"
        )


def compile_all(programs: Iterable[Program], chips: int) -> list[Cost]:
    """Compiles for `chips` devices, one after the other."""
    return [_compile(program, chips) for program in programs]


def table(costs: Sequence[Cost], chip: Chip) -> str:
    """A Markdown table, a row per program; a dash where a number means nothing."""
    lines = [
        "| program | compile s | arguments GB | temporaries GB | peak GB | beside it GB | GFLOPs "
        "| HBM GB | roofline ms | tokens/s/chip | HBM bytes / least |",
        "|---|" + "---:|" * 10,
    ]
    for cost in costs:
        program, seconds = cost.program, cost.seconds(chip)
        sizes = (cost.argument_bytes, cost.temporary_bytes, cost.peak_bytes, program.beside_bytes)
        least = program.least_bytes
        cells = [
            program.name,
            f"{cost.compile_seconds:.1f}",
            *(f"{size / _GB:.2f}" for size in sizes),
            f"{cost.flops / 1e9:.1f}",
            f"{cost.hbm_bytes / _GB:.3f}",
            f"{seconds * 1e3:.2f}",
            f"{program.tokens / seconds:,.0f}" if program.tokens and seconds else "–",
            f"{cost.hbm_bytes / least:.3f}" if least else "–",
        ]
        if cost.refusal:
            cells = [program.name, "does not fit", *["–"] * 9]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compile(program: Program, chips: int) -> Cost:
    lowered = program.traced.lower()
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        first, *_ = str(error).splitlines()
        if not first.startswith("RESOURCE_EXHAUSTED"):
            raise
        return Cost(program=program, refusal=first)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    kept = memory.argument_size_in_bytes + results + memory.generated_code_size_in_bytes
    flops = matmul_flops(program.traced.jaxpr, open_trips=program.open_trips)
    moved = hbm_bytes(compiled.as_text(), open_trips=program.open_trips)
    return Cost(
        program=program,
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=kept + memory.temp_size_in_bytes,
        flops=flops / chips / program.steps,
        hbm_bytes=moved / program.steps,
    )


def matmul_flops(jaxpr: Any, *, open_trips: int = 1) -> int:
    """FLOPs of a traced program's matmuls over all devices, kernels by their own estimate.

    `open_trips`: how often loops run whose end the data decides. Of the branches of a condition
    the dearest counts.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        params, name = eqn.params, eqn.primitive.name
        inner = [matmul_flops(j, open_trips=open_trips) for j in _jaxprs(params.values())]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            width = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * width * math.prod(eqn.outvars[0].aval.shape)
        elif name == "pallas_call":
            estimate = params["cost_estimate"]
            total += 0 if estimate is None else estimate.flops
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += open_trips * sum(inner)
        elif name == "cond":
            total += max(inner)
        else:  # within shard_map shapes are one device's
            total += sum(inner) * (params["mesh"].size if name == "shard_map" else 1)
    return total


def _jaxprs(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)
