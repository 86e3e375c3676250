"""Workload C of benchmarks/learner.py: what an update of a large vocabulary takes in memory.

    python benchmarks/learner_memory.py --remat full

Run as a script it is the process whose memory is measured, and prints its figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from learner_work import small_qwen2
from report import Table

from r1s_jax.models.decoder import init_params
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.programs import LearnerPrograms, LearnerState, TokenValues
from r1s_jax.sharding import MeshConfig, make_mesh

VOCABULARY, SMALL_VOCABULARY = 151_936, 128
ROWS, TOKENS = 8, 1024
MB = 1e6


def memory_table() -> Table:
    """Each way of rematerialising, in a process of its own."""
    rows = []
    for remat in ("full", "none"):
        command = [sys.executable, str(Path(__file__).resolve()), "--remat", remat]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        m = json.loads(done.stdout.splitlines()[-1])
        kept = 4 * m["params"]
        allowed, peak = kept + m["activations"], max(m["accumulate"], m["apply"])
        rows.append(
            [remat, f"{kept / MB:.0f}", f"{m['activations'] / MB:.0f}"]
            + [f"{m[name] / MB:.0f}" for name in ("accumulate", "apply", "resident")]
            + [f"**{peak / allowed:.2f}x**", f"{peak / (allowed - m['params']):.2f}x"]
            + [f"{m['resident'] / allowed:.2f}x"]
            + [f"{m['largest']:.2e}", str(m["logits"])]
        )
    logits = ROWS * TOKENS * VOCABULARY
    return Table(
        title=f"C: peak memory with a vocabulary of {VOCABULARY}",
        text=(
            f"The model of A with that vocabulary, {ROWS} x {TOKENS} tokens, f32, Adam; MB. Kept: "
            "parameters, two moments and the gradient. Activations: what the compiler says that "
            f"the gradient takes for itself with a vocabulary of {SMALL_VOCABULARY}. Gradient and "
            "step: what it says of those programs, arguments and everything else that is alive "
            "meanwhile included. Resident: the most that a process gained while it made two "
            "updates, programs compiled before. Last, the largest array of the compiled programs "
            f"and how many have as many numbers as the logits ({logits:.2e}) or more."
        ),
        header=[
            "remat",
            "kept",
            "activations",
            "gradient",
            "step",
            "resident",
            "compiler's / (kept + activations)",
            "the gradient not counted as kept",
            "resident / (kept + activations)",
            "largest array",
            "as large as the logits",
        ],
        rows=rows,
    )


def measure(remat: str) -> dict[str, float]:
    """Bytes, see `memory_table`; `largest` and `logits` count numbers and arrays."""
    small = _gradient_bytes(_compiled(_programs(remat, SMALL_VOCABULARY))[0])
    programs = _programs(remat, VOCABULARY)
    accumulate, apply = _compiled(programs)
    params, state = (_bytes(t) for t in (programs.abstract_params(), programs.abstract_state()))
    sizes = [size for program in (accumulate, apply) for size in array_sizes(program.as_text())]
    return {
        "params": params,
        "activations": small,
        # The moments are no argument of the gradient, but alive.
        "accumulate": _all_bytes(accumulate) + state - params,
        "apply": _all_bytes(apply),
        "resident": _resident(programs, accumulate, apply),
        "largest": max(sizes),
        "logits": sum(size >= ROWS * TOKENS * VOCABULARY for size in sizes),
    }


def array_sizes(hlo: str) -> list[int]:
    """How many numbers every array of a program's text has."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", hlo)
    return [math.prod(int(n) for n in shape.split(",")) for shape in shapes]


def _programs(remat: Any, vocabulary: int) -> LearnerPrograms:
    config = LearnerConfig(rows=ROWS, row_tokens=TOKENS, remat=remat)
    model = small_qwen2(vocab_size=vocabulary)
    return LearnerPrograms(model, config, make_mesh(MeshConfig()), temperature=1.0)


def _compiled(programs: LearnerPrograms) -> tuple[Any, Any]:
    params, number = programs.abstract_params(), programs.abstract_values()
    values = TokenValues(
        advantages_BT=number,
        weights_BT=number,
        old_BT=number,
        ref_BT=None,
        fresh=jax.ShapeDtypeStruct((), bool),
    )
    arguments = params, params, None, programs.abstract_batch(), values
    return (
        programs.accumulate.lower(*arguments).compile(),
        programs.apply.lower(programs.abstract_state(), params).compile(),
    )


def _all_bytes(compiled: Any) -> int:
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + results + m.temp_size_in_bytes


def _gradient_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _resident(programs: LearnerPrograms, accumulate: Any, apply: Any) -> float:
    """Bytes that two updates add to the process at most; NaN where Linux's /proc is missing."""

    def begin() -> LearnerState:
        params, _ = programs.begin(init_params(programs.model, 0), 0)
        return LearnerState(params=params, opt_state=programs.init(params))

    jax.block_until_ready(programs.zeros(begin().params))  # these too are compiled before
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
    except OSError:
        return math.nan
    state = begin()
    shape = ROWS, TOKENS
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, programs.model.vocab_size, shape).astype(np.int32)
    zeros, ones = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    abstract = programs.abstract_batch()
    batch = jax.device_put(
        type(abstract)(
            tokens_BT=tokens,
            positions_BT=np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)),
            segments_BT=np.ones(shape, np.int32),
            mask_BT=np.tile(np.arange(TOKENS) > 0, (ROWS, 1)),
            sampler_logprobs_BT=zeros,
            drawn_logprobs_BT=zeros,
        ),
        jax.tree.map(lambda x: x.sharding, abstract),
    )
    values = jax.device_put(
        TokenValues(
            advantages_BT=ones,
            weights_BT=ones / ones.size,
            old_BT=zeros,
            ref_BT=None,
            fresh=np.array(True),
        )
    )
    for _ in range(2):
        grads = programs.zeros(state.params)
        grads, _ = accumulate(grads, state.params, None, batch, values)
        state, found = apply(state, grads)
        del grads
        jax.block_until_ready(state)
    assert not found["skipped"]
    return _status("VmHWM") - before


def _status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return 1024.0 * int(re.search(rf"^{name}:\s+(\d+) kB", text, re.M)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remat", required=True)
    print(json.dumps(measure(parser.parse_args().remat)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
