"""What this machine can do just now: the figures beside which the others are read.

python benchmarks/calibrate.py
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SQUARE = 1024
STREAM_BYTES = 2**28  # several times any cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """GFLOP/s and GB/s in f32, each the best of some rounds: others may use the machine too.

    matmul: 1024 x 1024 by 1024 x 1024.
    bandwidth: reading an array much larger than the caches, once.
    skinny: `rows` x `width` through feed-forward matrices there and back, always the same two,
        which stay in the caches: the rate of the arithmetic.
    skinny_streamed: the same through ever new matrices, which come from memory.
    """

    matmul: float
    bandwidth: float
    skinny: float
    skinny_streamed: float

    def floor_seconds(self, weight_bytes: float, flops: float) -> float:
        """The least a step with these skinny matmuls can take."""
        return max(weight_bytes / self.bandwidth, flops / self.skinny) / 1e9


def matmul_rate(rounds: int = 7) -> float:
    """GFLOP/s of `Calibration.matmul` alone."""
    square = jax.random.normal(jax.random.key(0), (SQUARE, SQUARE), jnp.float32)
    return 2 * SQUARE**3 / _best(rounds, _matmul, square, square) / 1e9


def calibrate(
    *, rows: int = 16, width: int = 576, hidden: int = 1536, rounds: int = 7
) -> Calibration:
    """Some seconds' worth of measurements; the default shape is SmolLM2-135M's."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, width), jnp.float32)
    pairs = STREAM_BYTES // (2 * 4 * width * hidden)
    # Arrays of their own, as the matrices of a model are when its layers are unrolled.
    matrices = [
        (
            jax.random.normal(k, (width, hidden), jnp.float32) * width**-0.5,
            jax.random.normal(k, (hidden, width), jnp.float32) * hidden**-0.5,
        )
        for k in jax.random.split(key, pairs)
    ]
    flops = 2 * 2 * rows * width * hidden * pairs
    long = jnp.ones(STREAM_BYTES // 4, jnp.float32)

    return Calibration(
        matmul=matmul_rate(rounds),
        # A product with a vector reads on all cores, a plain sum may not.
        bandwidth=max(
            STREAM_BYTES / _best(rounds, program, array) / 1e9
            for program, array in ((_sum, long), (_gemv, long.reshape(-1, 4096)))
        ),
        skinny=flops / _best(rounds, _again, x, matrices[0], pairs) / 1e9,
        skinny_streamed=flops / _best(rounds, _through, x, matrices) / 1e9,
    )


# Compiled once per process, however often the machine is measured.
_matmul, _sum = jax.jit(jnp.matmul), jax.jit(jnp.sum)


@jax.jit
def _gemv(matrix: Array) -> Array:
    return matrix @ matrix[0]


@jax.jit
def _through(x: Array, matrices: list[tuple[Array, Array]]) -> Array:
    for up, down in matrices:
        x = (x @ up) @ down
    return x


@jax.jit
def _again(x: Array, pair: tuple[Array, Array], times: int) -> Array:
    return jax.lax.fori_loop(0, times, lambda _, x: _through(x, [pair]), x)


def _best(rounds: int, program: Callable, *arguments: Any) -> float:
    """The least seconds of a call, after one that may compile."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> int:
    for name, value in dataclasses.asdict(calibrate()).items():
        print(f"{name}: {value:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
