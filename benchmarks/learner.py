"""The learner beside tunix's, and beside the machine: writes benchmarks/learner.md.

    python benchmarks/learner.py --tunix_python PATH [--data FOLDER]
    python benchmarks/learner.py --only A B C D

A: one policy-gradient update of 16 x 512 tokens, ours and tunix's GRPO step in turns, on the same
weights, tokens, advantages and optimizer (`pip install google-tunix` in an environment of its own;
without `--tunix_python` that column stays empty); and where the time of ours goes. B: episodes as
long as the transcripts released with R1-Searcher, packed into rows and padded. C: peak memory of an
update with a large vocabulary. D: an update on an NVIDIA GPU, where JAX sees one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402
import learner_work as work  # noqa: E402
import numpy as np  # noqa: E402
from calibrate import matmul_rate  # noqa: E402
from learner_gpu import gpu_table  # noqa: E402
from learner_memory import memory_table  # noqa: E402
from learner_packing import layouts_table, shares_table  # noqa: E402
from learner_parts import parts_table  # noqa: E402
from peers.protocol import Peer  # noqa: E402
from report import Table, heading, spread  # noqa: E402
from rollout_work import DATA, write_small_qwen2  # noqa: E402

from r1s_jax.models import hf  # noqa: E402
from r1s_jax.protocol.tokenizer import Tokenizer  # noqa: E402
from r1s_jax.rl.advantages import advantages  # noqa: E402
from r1s_jax.rl.algorithm import AlgorithmConfig  # noqa: E402
from r1s_jax.rl.config import LearnerConfig  # noqa: E402
from r1s_jax.rl.learner import Learner  # noqa: E402
from r1s_jax.run.host_memory import keep_freed_memory  # noqa: E402
from r1s_jax.sharding import MeshConfig, make_mesh  # noqa: E402
from r1s_jax.types import UserError  # noqa: E402

A_CONFIG = LearnerConfig(
    algorithm=AlgorithmConfig(estimator="grpo"),
    updates_per_rollout=1,
    rows=2,  # of a micro-batch: what its layers pass on stays in the caches
    row_tokens=work.A_TOKENS,
    scan_layers=False,
    remat="none",
)
A_UPDATES = 2  # of a turn
# What `keep_freed_memory` asks of glibc, for a process that is to be asked before it starts.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
}
CLOSE = 1e-3  # relative, of what both sides say of their first update


def workload_a(scratch: Path, tunix_python: str | None, rounds: int) -> str:
    """The update, ours and tunix's in turns, and the parts of ours."""
    folder = write_small_qwen2(scratch / "small", work.LEARNER_QWEN2)
    model, mesh = hf.read_config(folder), make_mesh(MeshConfig())
    assert model == dataclasses.replace(
        work.small_qwen2(), max_position_embeddings=model.max_position_embeddings
    )
    learner = Learner(
        model,
        A_CONFIG,
        mesh=mesh,
        params=hf.load_params(folder, model, mesh),
        temperature=1.0,
        pad_id=0,
    )
    trajectories = work.full_rows(model, work.A_ROWS, work.A_TOKENS, work.A_PROMPT)
    rewards, groups = work.coin_rewards(work.A_ROWS)

    def update() -> dict[str, float]:
        found = learner.update(trajectories, rewards, groups)
        jax.block_until_ready(learner.state)
        return found

    first = update()
    peers: list[Peer] = []
    if tunix_python:
        write_for_tunix(scratch, trajectories, rewards, groups)
        peers = [start_tunix(scratch, tunix_python, folder, s) for s in (None, KEEP_FREED_MEMORY)]
        for name in ("grad_norm", "entropy"):
            a, b = first[name], peers[0].ready[name]
            if abs(a - b) > CLOSE * abs(b):
                raise RuntimeError(f"{name} of the first update: ours {a}, tunix's {b}")
    update()
    lengths = [work.A_TOKENS] * work.A_ROWS
    half, full = (
        sum(work.gradient_flops(model, lengths, causal=causal).values()) for causal in (True, False)
    )
    rows, shares, taken, rates = [], [], [], []
    ratios: list[list[float]] = [[] for _ in peers]
    before = matmul_rate(20)
    for _ in range(rounds):
        for _ in range(A_UPDATES):
            begin = time.perf_counter()
            update()
            taken.append(time.perf_counter() - begin)
        ours = statistics.fmean(taken[-A_UPDATES:])
        after = matmul_rate(20)
        rate = (before + after) / 2
        rates += [before, after]
        shares.append((half / ours / 1e9 / rate, full / ours / 1e9 / rate))
        line = [f"{rate:.0f} GFLOP/s", f"{ours:.2f}", *(f"{x:.0%}" for x in shares[-1])]
        for peer, found in zip(peers, ratios, strict=True):
            theirs = peer.ask("run", A_UPDATES)["seconds"] / A_UPDATES
            found.append(theirs / ours)
            line += [f"{theirs:.2f}", f"{found[-1]:.2f}"]
            after = matmul_rate(20)
        rows.append(line)
        print(*line, flush=True)
        before = after
    for peer in peers:
        peer.quit()
    of_rate = [spread([100 * x for x in column], 0) for column in zip(*shares, strict=True)]
    compared = [cell for found in ratios for cell in ("", f"**{spread(found)}x**")]
    rows.append(["**median (range)**", "", *(f"**{x} %**" for x in of_rate), *compared])
    best = min(taken) * max(rates) * 1e9
    at_best = f"{half / best:.0%}", f"{full / best:.0%}"
    best_line = [f"best: {max(rates):.0f} GFLOP/s", f"{min(taken):.2f}", *at_best]
    rows.append([*best_line, *[""] * len(compared)])
    layers, vocabulary = work.matmul_params(model)
    table = Table(
        title=f"A: one update, {work.A_ROWS} x {work.A_TOKENS} tokens",
        text=(
            f"A Qwen2 of {model.num_hidden_layers} layers, hidden {model.hidden_size}, vocabulary "
            f"{model.vocab_size}, f32; one episode a row, {work.A_PROMPT} tokens of prompt. Ours: "
            "`Learner.update` from trajectories and rewards on the host (advantages, rows, "
            "gradient, metrics, AdamW step). tunix: `Trainer.train`, as its RL cluster asks it, "
            "with its `grpo` loss at beta 0 and its token ids, masks and advantages on the host "
            "(gradient, metrics, the same AdamW step; no log-probs beforehand, one iteration "
            "needs none). Both sides take the same numbers and agree on gradient norm and entropy "
            f"of the first update. Ours goes through {A_CONFIG.rows} rows at a time and adds up "
            "their gradients; tunix takes all at once, its default. Ours keeps freed memory "
            "(`run.host_memory`), as runs on CPUs do; tunix as it comes, and once more with the "
            f"same asked of its process. {A_UPDATES} updates a turn; seconds of one. FLOPs: 6 x "
            "matmul parameters (layers "
            f"{layers:,}, vocabulary {vocabulary:,}) x tokens, and 12 x layers x hidden x pairs of "
            f"attention: {half / 1e9:.0f} GFLOP with the pairs that causal attention needs, "
            f"{full / 1e9:.0f} with all. Their share of the machine's rate, 1024 x 1024 "
            "products in f32 measured before and after each turn, the best of 20 each time. Others "
            "use the machine too, so the last line has the best of ours beside the best of those:"
        ),
        header=[
            *("machine", "ours", "causal pairs", "all pairs"),
            *("tunix", "tunix / ours", "tunix, keeps memory", "it / ours")[: 2 * len(peers)],
        ],
        rows=rows,
    )
    parts = parts_table(model, A_CONFIG, update, trajectories, rounds)
    return f"{table}\n{parts}"


def write_for_tunix(scratch: Path, trajectories: Any, rewards: Any, groups: Any) -> None:
    """The batch and the optimizer's numbers, as files."""
    tokens = np.stack([t.token_ids_T for t in trajectories])
    counts = np.array([t.sampled_count for t in trajectories])
    p = work.A_PROMPT
    np.savez(
        scratch / "batch.npz",
        prompt_ids=tokens[:, :p],
        prompt_mask=np.ones_like(tokens[:, :p], bool),
        completion_ids=tokens[:, p:],
        completion_mask=np.ones_like(tokens[:, p:], bool),
        advantages=advantages(rewards, groups, counts, estimator=A_CONFIG.algorithm.estimator),
    )
    optimizer = {
        "learning_rate": A_CONFIG.learning_rate,
        "b1": A_CONFIG.adam_b1,
        "b2": A_CONFIG.adam_b2,
        "weight_decay": A_CONFIG.weight_decay,
        "clip_norm": A_CONFIG.clip_norm,
    }
    (scratch / "optimizer.json").write_text(json.dumps(optimizer))


def start_tunix(
    scratch: Path, python: str, folder: Path, settings: Mapping[str, str] | None
) -> Peer:
    """tunix's trainer in a process of its own, warmed up."""
    return Peer(
        [
            *(python, str(HERE / "peers" / "tunix_grpo.py"), "--folder", str(folder)),
            *("--batch", str(scratch / "batch.npz")),
            *("--optimizer", str(scratch / "optimizer.json")),
        ],
        settings,
    )


def workload_b(data: Path, rounds: int) -> str:
    """How full packed rows are, and what that is worth."""
    from tests.real import qwen2_5_tokenizer

    masks = work.transcript_masks(Tokenizer.load(qwen2_5_tokenizer()), data)
    return f"{shares_table(masks)}\n{layouts_table(masks, rounds)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tunix_python", help="a Python that has google-tunix")
    parser.add_argument("--data", type=Path, default=DATA, help="the released transcripts")
    parser.add_argument("--only", nargs="+", choices=["A", "B", "C", "D"])
    parser.add_argument("--rounds", type=int, default=7, help="of A and D; half as many of B")
    parser.add_argument("--out", type=Path, help="learner.md beside this file, if all is measured")
    args = parser.parse_args()
    gpu = jax.devices()[0].platform == "gpu"
    chosen = args.only or ["A", "B", "C", *["D"] * gpu]
    out = args.out or (HERE / "learner.md" if args.tunix_python and not args.only else None)
    keep_freed_memory()
    parts = [heading("The learner", __file__)]
    try:
        if "D" in chosen and not gpu:
            raise UserError("D needs a GPU that JAX sees (requirements-gpu.txt)")
        with tempfile.TemporaryDirectory() as name:
            jobs: dict[str, Callable[[], Table | str]] = {
                "A": lambda: workload_a(Path(name), args.tunix_python, args.rounds),
                "B": lambda: workload_b(args.data, max(1, args.rounds // 2)),
                "C": memory_table,
                "D": lambda: gpu_table(args.rounds),
            }
            for job in chosen:
                parts.append(str(jobs[job]()))
                print(parts[-1], flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if out:
        out.write_text("\n".join(parts), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
