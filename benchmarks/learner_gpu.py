"""Workload D of benchmarks/learner.py: an update of SmolLM2-135M's shape on an NVIDIA GPU."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
from learner_work import coin_rewards, full_rows, gradient_flops
from report import Table, spread

from r1s_jax.models.decoder import DecoderConfig, Remat, init_params
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.learner import Learner
from r1s_jax.sharding import MeshConfig, make_mesh

SMOLLM2_135M = DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
SHAPES: tuple[tuple[int, int, Remat], ...] = (
    (16, 1024, "none"),
    (32, 1024, "none"),
    (32, 1024, "dots"),
    (32, 1024, "full"),
    (8, 4096, "dots"),
    (8, 4096, "full"),
)  # rows, tokens, remat
# bf16 with f32 sums, without sparsity, FLOP/s: NVIDIA's data sheets, by a part of JAX's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}
SQUARE = 8192


def gpu_table(rounds: int) -> Table:
    """Tokens a second of whole updates, host included, and their share of the card's peak."""
    device = jax.devices()[0].device_kind
    peak = next((rate for name, rate in PEAKS.items() if name in device), None)
    rows = []
    for number, tokens, remat in SHAPES:
        rate = bf16_rate()
        try:
            seconds = update_seconds(SMOLLM2_135M, number, tokens, remat, rounds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append([f"{number} x {tokens}", remat, *["out of memory"], *[""] * 5])
            continue
        middle = statistics.median(seconds)
        lengths = [tokens] * number
        half, full = (
            sum(gradient_flops(SMOLLM2_135M, lengths, causal=c).values()) / middle
            for c in (True, False)
        )
        of_peak = [f"{x / peak:.1%}" if peak else "unknown" for x in (half, full)]
        rows.append(
            [
                f"{number} x {tokens}",
                remat,
                spread([1000 * x for x in seconds], 0),
                f"{number * tokens / middle:,.0f}",
                *of_peak,
                f"{half / rate:.1%}",
                f"{rate / 1e12:.0f}",
            ]
        )
    return Table(
        title=f"D: SmolLM2-135M's shape on {device}",
        text=(
            "One update (gradient and AdamW step, batch on the host) of random weights, bf16 "
            f"compute with f32 masters; {rounds} updates each. FLOPs as in A, nothing computed "
            "twice is counted twice; beside the data sheet's peak the rate of a bf16 product of "
            f"{SQUARE} x {SQUARE}, measured before."
        ),
        header=[
            "rows x tokens",
            "remat",
            "ms",
            "tokens/s",
            "of peak, attention causal",
            "of peak, all pairs",
            "of the measured rate, causal",
            "measured TFLOP/s",
        ],
        rows=rows,
    )


def update_seconds(
    model: DecoderConfig, rows: int, tokens: int, remat: Remat, rounds: int
) -> list[float]:
    """Seconds of each of `rounds` updates, after two that compile and warm up."""
    config = LearnerConfig(
        rows=rows, row_tokens=tokens, remat=remat, compute_dtype="bfloat16", updates_per_rollout=1
    )
    learner = Learner(
        model,
        config,
        mesh=make_mesh(MeshConfig()),
        params=init_params(model, 0),
        temperature=1.0,
        pad_id=0,
    )
    trajectories = full_rows(model, rows, tokens, prompt=tokens // 8)
    rewards, groups = coin_rewards(rows)
    taken = []
    for _ in range(rounds + 2):
        begin = time.perf_counter()
        found = learner.update(trajectories, rewards, groups)
        jax.block_until_ready(learner.state)
        taken.append(time.perf_counter() - begin)
    assert found["skipped_updates"] == 0
    return taken[2:]


def bf16_rate(rounds: int = 10) -> float:
    """FLOP/s of a large product."""
    square = jax.random.normal(jax.random.key(0), (SQUARE, SQUARE), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(square, square))
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(product(square, square))
        seconds.append(time.perf_counter() - begin)
    return 2 * SQUARE**3 / min(seconds)
