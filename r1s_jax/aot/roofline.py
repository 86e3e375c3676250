"""What compiled programs take on a chip: memory, work, and the time that the chip's rates allow.

Times are rooflines (Williams et al. 2009): the largest of a program's matmul FLOPs over the chip's
peak, its HBM bytes over the bandwidth and what it sends to other chips over the links', as if all
three went on side by side. What is neither a matmul nor a kernel's is not in them. FLOPs are
counted in the traced program, where loops say how often they run and what a backward pass computes
again stands once more; bytes in the compiled one, see `hlo_bytes` and `hlo_links`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from r1s_jax.aot.hlo_bytes import hbm_bytes
from r1s_jax.aot.hlo_links import link_bytes

_GB = 1e9
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU chip: bytes of HBM that programs get, bytes and bf16 FLOPs a second.

    links_per_second: bytes that it sends along one dimension of its torus, both ways together.
    """

    name: str
    hbm_bytes: int
    bytes_per_second: float
    flops_per_second: float
    links_per_second: float


# By JAX's name of the device. HBM: what the compiler says is available on one device (its message
# for a program that is too large). Rates: Google Cloud's pages on v5e, v5p and v6e; of the links
# they give both directions of all dimensions together: 400, 1200 and 800 GB/s, here 1/4, 1/6, 1/4.
CHIPS = {
    "TPU v5 lite": Chip(
        name="v5e",
        hbm_bytes=int(15.75 * _GIB),
        bytes_per_second=819e9,
        flops_per_second=197e12,
        links_per_second=100e9,
    ),
    "TPU v5": Chip(
        name="v5p",
        hbm_bytes=int(95.74 * _GIB),
        bytes_per_second=2765e9,
        flops_per_second=459e12,
        links_per_second=200e9,
    ),
    "TPU v6 lite": Chip(
        name="v6e",
        hbm_bytes=int(31.25 * _GIB),
        bytes_per_second=1640e9,
        flops_per_second=918e12,
        links_per_second=200e9,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A traced program (`jax.jit(f).trace(...)`), ready to be compiled; all numbers per chip.

    alive_bytes: of its arguments, what is there anyway before and after it (weights, the cache).
    open_trips: how often a loop runs whose end the data decides. steps: one run counts as so many,
    and costs are given for one. tokens: of one step. least_bytes: what a step has to read at least.
    runs: how often a phase runs it, where that is known beforehand.
    """

    name: str
    traced: Any
    alive_bytes: int = 0
    open_trips: int = 1
    steps: int = 1
    tokens: float = 0.0
    least_bytes: int = 0
    runs: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a compiled program takes, per chip; FLOPs, HBM and link bytes of one step.

    result_bytes: without those that take an argument's place; the program's own code included.
    `refusal`: why there is no such program (the compiler ran out of HBM); the rest is zero then.
    """

    program: Program
    compile_seconds: float = 0.0
    argument_bytes: int = 0
    result_bytes: int = 0
    temporary_bytes: int = 0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    link_bytes: float = 0.0
    refusal: str = ""

    @property
    def own_bytes(self) -> int:
        """What it needs beyond what is alive anyway."""
        needed = self.argument_bytes + self.result_bytes + self.temporary_bytes
        return max(needed - self.program.alive_bytes, 0)

    def parts(self, chip: Chip) -> dict[str, float]:
        """Seconds of a step by what they are spent on, were it the only thing."""
        return {
            "FLOPs": self.flops / chip.flops_per_second,
            "HBM": self.hbm_bytes / chip.bytes_per_second,
            "links": self.link_bytes / chip.links_per_second,
        }

    def seconds(self, chip: Chip) -> float:
        """The roofline time of a step: everything overlaps."""
        return max(self.parts(chip).values())

    def serial_seconds(self, chip: Chip) -> float:
        """The same if nothing is computed while chips talk to each other."""
        parts = self.parts(chip)
        return max(parts["FLOPs"], parts["HBM"]) + parts["links"]


def compile_all(programs: Iterable[Program], chips: int) -> list[Cost]:
    """Compiles for `chips` devices, one after the other."""
    return [_compile(program, chips) for program in programs]


def table(costs: Sequence[Cost], chip: Chip) -> str:
    """A Markdown table, a row per program; a dash where a number means nothing."""
    lines = [
        "| program | compile s | arguments GB | results GB | temporaries GB | GFLOPs | HBM GB "
        "| links GB | roofline ms | bound by | tokens/s/chip | HBM bytes / least |",
        "|---|" + "---:|" * 8 + "---|---:|---:|",
    ]
    for cost in costs:
        program, parts, seconds = cost.program, cost.parts(chip), cost.seconds(chip)
        sizes = (cost.argument_bytes, cost.result_bytes, cost.temporary_bytes)
        least = program.least_bytes
        cells = [
            program.name,
            f"{cost.compile_seconds:.1f}",
            *(f"{size / _GB:.2f}" for size in sizes),
            f"{cost.flops / 1e9:.1f}",
            f"{cost.hbm_bytes / _GB:.3f}",
            f"{cost.link_bytes / _GB:.3f}",
            f"{seconds * 1e3:.2f}",
            max(parts, key=lambda part: parts[part]) if seconds else "–",
            f"{program.tokens / seconds:,.0f}" if program.tokens and seconds else "–",
            f"{cost.hbm_bytes / least:.3f}" if least else "–",
        ]
        if cost.refusal:
            cells = [program.name, "does not fit", *["–"] * 10]
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
    memory, text = compiled.memory_analysis(), compiled.as_text()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = matmul_flops(program.traced.jaxpr, open_trips=program.open_trips)
    moved = hbm_bytes(text, open_trips=program.open_trips)
    sent = link_bytes(text, open_trips=program.open_trips)
    return Cost(
        program=program,
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        result_bytes=results + memory.generated_code_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=flops / chips / program.steps,
        hbm_bytes=moved / program.steps,
        link_bytes=sent / program.steps,
    )


def matmul_flops(jaxpr: Any, *, open_trips: int = 1) -> int:
    """FLOPs of a traced program's matmuls over all devices, kernels by their own estimate.

    JAX's splash attention has none: its matmuls are counted over the blocks up to the diagonal.
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
            total += _splash_flops(eqn) if estimate is None else estimate.flops
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += open_trips * sum(inner)
        elif name == "cond":
            total += max(inner)
        else:  # within shard_map shapes are one device's
            total += sum(inner) * (params["mesh"].size if name == "shard_map" else 1)
    return total


# Matmuls [T, h] x [h, S] in the kernels of splash attention, which have no estimate of their own:
# scores and mixing; then scores again, by which all gradients go, and each kernel's share of these.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _splash_flops(eqn: Any) -> int:
    """Of a causal splash kernel, which visits the blocks up to the diagonal; else 0."""
    name = eqn.params["name"] or ""
    matmuls = next((n for start, n in _SPLASH.items() if name.startswith(start)), 0)
    if not matmuls:
        return 0
    shapes = (v.aval.shape for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating))
    *heads, length, width = next(shape for shape in shapes if len(shape) > 2)  # the queries
    blocks = eqn.params["grid_mapping"].grid[-1]
    return matmuls * math.prod(heads) * length**2 * width * (blocks + 1) // blocks


def _jaxprs(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)
