"""One gradient of the tiny policy with layers unrolled or scanned, and what is computed again.

    python benchmarks/layers.py

All six ways take turns in one process; prints a Markdown table of seconds, the median of seven.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ROWS, LENGTH, ROUNDS = 16, 256, 7


def main() -> int:
    import jax
    import numpy as np

    from r1s_jax.models.decoder import init_params
    from r1s_jax.models.families import read_config
    from r1s_jax.models.logprobs import token_logprobs

    model = read_config(ROOT / "configs" / "models" / "tiny_base")
    params = init_params(model, 0)
    rng = np.random.default_rng(0)
    tokens = jax.numpy.asarray(rng.integers(0, model.vocab_size, (ROWS, LENGTH)))

    def total(params, tokens, **how):
        return token_logprobs(model, params, tokens, **how)[0].sum()

    ways = list(itertools.product((False, True), ("none", "full", "dots")))
    programs = {way: jax.jit(jax.grad(partial(total, scan=way[0], remat=way[1]))) for way in ways}
    seconds: dict[tuple[bool, str], list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(params, tokens))
            if number:  # the first round compiles
                seconds[way].append(time.perf_counter() - begin)
    print("| | nothing again | whole layers | all but matmuls |\n|---|---:|---:|---:|")
    for scan, name in ((False, "unrolled"), (True, "scanned")):
        row = (statistics.median(seconds[scan, remat]) for remat in ("none", "full", "dots"))
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
