"""Workload B of benchmarks/learner.py: episodes as long as the released ones, laid into rows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from calibrate import matmul_rate
from learner_parts import Gradients, seconds_of
from learner_work import drawn_episodes, gradient_flops, small_qwen2
from report import Table, spread

from r1s_jax.rl.batching import Batch, pack
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.types import Trajectory

EPISODES = 64
DRAWS = 20
# A quarter of the model of A: what its parts take of a gradient stays as it is.
LAYERS, VOCABULARY = 1, 500
MICRO_TOKENS, MICRO_ROWS = 8192, 8  # of a micro-batch: packed tokens, padded rows
PADDED = "padded to the longest"
SKIPPED = "the same, attention skips padding"
MULTIPLE = 128  # padded lengths are rounded up to it


def shares_table(masks: Sequence[np.ndarray]) -> Table:
    """How full the rows are, for draws of two sizes."""
    model = small_qwen2()
    rows = []
    for count in (EPISODES, 256):
        for row_tokens in (2048, 4096, 8192):
            short = [mask_T for mask_T in masks if len(mask_T) <= row_tokens]
            shares, bounds = [], []
            for seed in range(DRAWS):
                trajectories = drawn_episodes(model, short, count, seed)
                tokens = sum(len(t.token_ids_T) for t in trajectories)
                used = len(pack(trajectories, rows=1, row_tokens=row_tokens, pad_id=0).batches)
                shares.append(tokens / (used * row_tokens))
                bounds.append(tokens / (-(-tokens // row_tokens) * row_tokens))
            drawn = f"{count} of {len(short)}"
            rows.append([drawn, str(row_tokens), spread(shares, 3), spread(bounds, 3)])
    lengths = np.array([len(mask_T) for mask_T in masks])
    quantiles = ", ".join(f"{np.percentile(lengths, p):.0f}" for p in (1, 50, 99))
    return Table(
        title="B: packed tokens of a row's tokens",
        text=(
            f"The {len(masks)} transcripts released with R1-Searcher's Qwen2.5-7B, prompt and "
            f"documents included, by Qwen2.5's tokenizer: {lengths.mean():.0f} tokens on average, "
            f"1st, 50th and 99th percentile {quantiles}, longest {lengths.max()}. Episodes longer "
            f"than a row are left out. Medians, least and most of {DRAWS} draws; bound: as few "
            "rows as could hold so many tokens."
        ),
        header=["episodes", "row_tokens", "packed / row tokens", "bound"],
        rows=rows,
    )


def layouts_table(masks: Sequence[np.ndarray], rounds: int) -> Table:
    """One gradient of the same episodes in every layout, taking turns."""
    model = small_qwen2(LAYERS, VOCABULARY)
    longest = 4096
    short = [mask_T for mask_T in masks if len(mask_T) <= longest]
    draws = [drawn_episodes(model, short, EPISODES, seed) for seed in range(DRAWS)]
    trajectories = sorted(draws, key=filled)[DRAWS // 2]
    by_mask = padded(trajectories)
    layouts = {
        PADDED: [
            dataclasses.replace(batch, segments_BT=np.ones_like(batch.segments_BT))
            for batch in by_mask
        ],
        SKIPPED: by_mask,
    }
    in_order = sorted(trajectories, key=lambda t: -len(t.token_ids_T))
    layouts["sorted by length, micro-batches padded to their longest, padding skipped"] = [
        batch
        for start in range(0, EPISODES, MICRO_ROWS)
        for batch in padded(in_order[start : start + MICRO_ROWS])
    ]
    for row_tokens in (4096, 8192):
        packed = pack(
            trajectories, rows=MICRO_TOKENS // row_tokens, row_tokens=row_tokens, pad_id=0
        )
        layouts[f"packed into rows of {row_tokens}"] = list(packed.batches)
    gradients = Gradients.make(model, LearnerConfig(remat="none"))
    on_device = {
        name: [jax.tree.map(jnp.asarray, batch) for batch in batches]
        for name, batches in layouts.items()
    }

    def one(batches: Sequence[Batch]) -> Callable[[], Any]:
        return lambda: gradients.gradient(batches)

    before = matmul_rate(20)
    taken = seconds_of({name: one(batches) for name, batches in on_device.items()}, rounds)
    rate = (before + matmul_rate(20)) / 2
    lengths = [len(t.token_ids_T) for t in trajectories]
    tokens, flops = sum(lengths), sum(gradient_flops(model, lengths).values())
    rows = []
    for name, batches in layouts.items():
        seconds = taken[name]
        ratios = [
            statistics.median(a / b for a, b in zip(taken[other], seconds, strict=True))
            for other in (PADDED, SKIPPED)
        ]
        computed = sum(batch.tokens_BT.size for batch in batches)
        middle = statistics.median(seconds)
        rows.append(
            [
                name,
                str(len(batches)),
                f"{tokens / computed:.3f}",
                spread(seconds, 1),
                f"{EPISODES / middle:.2f}",
                f"{flops / middle / 1e9 / rate:.0%}",
                f"**{ratios[0]:.2f}x**",
                f"{ratios[1]:.2f}x",
            ]
        )
    return Table(
        title=f"B: a gradient of {EPISODES} episodes",
        text=(
            f"A quarter of the model of A (layers: {LAYERS}, vocabulary {VOCABULARY}), no "
            f"rematerialisation. Of {DRAWS} draws (padded to their longest, "
            f"{spread([filled(draw) for draw in draws])} of the tokens are episodes') the middle "
            f"one: {tokens} tokens in episodes of up to {max(lengths)}. "
            f"Packed: micro-batches of {MICRO_TOKENS} tokens; "
            f"padded: of {MICRO_ROWS} rows, their length rounded up to a multiple of {MULTIPLE}. "
            "Padding on the right needs no mask in causal attention, so a padded learner usually "
            "computes it too; ours would skip it, which is the second line. "
            f"{rounds} turns each; the machine made {rate:.0f} GFLOP/s before and after. Useful "
            "FLOPs: of the episodes alone, attention causal and within the episode."
        ),
        header=[
            "layout",
            "micro-batches",
            "episodes' tokens / tokens computed",
            "seconds",
            "episodes/s",
            "useful FLOPs of the machine's rate",
            "of padded",
            "of padded, skipped",
        ],
        rows=rows,
    )


def filled(trajectories: Sequence[Trajectory]) -> float:
    """Episodes' tokens of those of rows padded to the longest."""
    lengths = [len(t.token_ids_T) for t in trajectories]
    return sum(lengths) / (max(lengths) * len(lengths))


def padded(trajectories: Sequence[Trajectory]) -> list[Batch]:
    """A row an episode, all as long as the longest of them, MICRO_ROWS rows at a time."""
    longest = max(len(t.token_ids_T) for t in trajectories)
    row_tokens = -(-longest // MULTIPLE) * MULTIPLE
    rows = [pack([t], rows=1, row_tokens=row_tokens, pad_id=0).batches[0] for t in trajectories]
    return [
        jax.tree.map(lambda *parts: np.concatenate(parts), *rows[start : start + MICRO_ROWS])
        for start in range(0, len(rows), MICRO_ROWS)
    ]
