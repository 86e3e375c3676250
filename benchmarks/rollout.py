"""The rollout engine beside what others use, and beside the machine: writes benchmarks/rollout.md.

    python benchmarks/rollout.py --tunix_python PATH --tpu_python PATH [--data FOLDER]
    python benchmarks/rollout.py --only A B C step slices

Both sides of a workload take turns within one run, on the same weights and episodes, with a
calibration of the machine before each. A: tunix's own sampler, in an environment of its own
(`pip install google-tunix`; without `--tunix_python` that column stays empty). B: the loop that
everyone writes around transformers' `generate`. C and step: the engine alone, against what could
be had. slices: what tpu_scripts/compile_check.py says of TPU slices, in an environment that has
requirements-tpu.txt. The models are made here or fetched once by the tests' helpers (SmolLM2-135M);
B and C play questions and passages of the transcripts released with R1-Searcher.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rollout_work as work  # noqa: E402
from calibrate import Calibration, calibrate  # noqa: E402
from peers.protocol import Peer  # noqa: E402
from report import Table, heading  # noqa: E402
from rollout_ours import make_engine, run_scripts  # noqa: E402
from rollout_step import attention_seconds, sampling_seconds, step_seconds  # noqa: E402

from r1s_jax.engine.state import EngineConfig  # noqa: E402
from r1s_jax.models import hf  # noqa: E402
from r1s_jax.models.decoder import DecoderConfig, Params  # noqa: E402
from r1s_jax.protocol.tokenizer import Tokenizer  # noqa: E402
from r1s_jax.sharding import MeshConfig, make_mesh  # noqa: E402
from r1s_jax.types import UserError  # noqa: E402
from tests.real import smollm2  # noqa: E402

PEERS = HERE / "peers"
A_ENGINE = EngineConfig(rows=16, chunk=128, context=work.A_CACHE, page=128)
B_ROWS = 32
C_SHAPES = ((64, 32), (16, 4))  # rows, steps of a chunk
C_SECONDS = 0.2  # of a search
A_SECONDS = 3.0  # of a turn at least: the first runs after a pause are slower
SLICES = (
    ("--topology", "v5e:4x4"),
    ("--topology", "v5p:2x2x2"),
    ("--topology", "v6e:4x4"),
    ("--topology", "v5p:4x4x4", "--model", "qwen2_5_32b"),
)


def machine(c: Calibration) -> str:
    return f"{c.matmul:.0f} GFLOP/s, {c.bandwidth:.0f} GB/s"


def load(folder: Path) -> tuple[DecoderConfig, Params]:
    model = hf.read_config(folder)
    return model, hf.load_params(folder, model, make_mesh(MeshConfig()))


def ratios(result: dict[str, Any]) -> str:
    """Tokens prefilled per token of final context: with the padding of blocks / without."""
    context = result["context"]
    return f"{result['prefilled_padded'] / context:.2f} / {result['prefilled'] / context:.2f}"


def rate(play: Callable[[], dict[str, Any]]) -> float:
    """Tokens per second of one turn."""
    tokens, seconds = 0, 0.0
    while seconds < A_SECONDS:
        result = play()
        tokens, seconds = tokens + result["tokens"], seconds + result["seconds"]
    return tokens / seconds


def workload_a(scratch: Path, tunix_python: str | None, rounds: int) -> Table:
    """16 rows x 128 tokens in a cache of 1024, the peers' own shape."""
    folder = work.write_small_qwen2(scratch / "small")
    prompts = work.prompts_a()
    engine = make_engine(*load(folder), A_ENGINE)
    scripts = work.plain_scripts(prompts, work.A_NEW)
    peer = None
    if tunix_python:
        import numpy as np

        np.save(scratch / "prompts.npy", prompts)
        peer = Peer(
            [
                *(tunix_python, str(PEERS / "tunix_sampler.py"), "--folder", str(folder)),
                *("--prompts", str(scratch / "prompts.npy"), "--new", str(work.A_NEW)),
                *("--cache", str(work.A_CACHE)),
            ]
        )
    result = run_scripts(engine, scripts)
    rows, ours, theirs = [], [], []
    for _ in range(rounds):
        c = calibrate(width=256, hidden=704)
        ours.append(rate(lambda: run_scripts(engine, scripts)))
        line = [machine(c), f"{ours[-1]:.0f}", "", ""]
        if peer:
            theirs.append(rate(lambda: peer.ask("run")))
            line[2:] = f"{theirs[-1]:.0f}", f"{ours[-1] / theirs[-1]:.2f}"
        rows.append(line)
    if peer:
        peer.quit()
    compared = ["not measured", ""]
    if peer:
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        compared = [f"{statistics.median(theirs):.0f}", f"**{ratio:.1f}x**"]
    rows.append(["**median**", f"{statistics.median(ours):.0f}", *compared])
    return Table(
        title="A: 16 rows of 128 tokens, cache 1024",
        text=(
            "A Qwen2 of 4 layers, hidden 256, vocabulary 2000, f32; prompts of 32 tokens, "
            f"temperature 1. Tokens prefilled per token of final context: {ratios(result)} (with "
            "the padding of blocks / without). Each turn repeats the workload for "
            f"{A_SECONDS:.0f} s or more. Tokens per second:"
        ),
        header=["machine", "ours", "tunix sampler", "ratio"],
        rows=rows,
    )


def workload_b(scratch: Path, transcripts: work.Transcripts, questions: int) -> Table:
    """Search episodes of SmolLM2-135M: the whole loop."""
    folder = smollm2()
    model, params = load(folder)
    tokenizer = Tokenizer.load(folder, vocab_size=model.vocab_size)
    scripts = work.search_episodes(tokenizer, transcripts, questions=questions)
    path = work.write_for_peer(scratch / "scripts.jsonl", tokenizer, scripts)
    peer = Peer(
        [
            *(sys.executable, str(PEERS / "transformers_loop.py"), "--model", str(folder)),
            *("--episodes", str(path), "--threads", str(os.cpu_count())),
        ]
    )
    longest = max(script.context for script in scripts) + 1
    engine = make_engine(
        model, params, EngineConfig(rows=B_ROWS, chunk=32, context=longest, page=128)
    )
    half = len(scripts) // 2
    rows, theirs = [], []

    def line(name: str, play: Callable[[], dict[str, Any]], waited: bool) -> dict[str, Any]:
        c, result = calibrate(), play()
        rows.append(
            [
                name,
                machine(c),
                str(result["episodes"]),
                f"{result['seconds']:.0f}",
                f"{60 * result['episodes'] / result['seconds']:.1f}",
                ratios(result),
                f"{result['retrieval_wait_seconds']:.2f}" if waited else "",
            ]
        )
        print(*rows[-1], flush=True)
        return result

    theirs.append(line("loop", lambda: peer.ask("run", 0, half), False))
    ours = [line("ours", lambda: run_scripts(engine, scripts, tokenizer=tokenizer), True)]
    theirs.append(line("loop", lambda: peer.ask("run", half, len(scripts) - half), False))
    peer.quit()

    def per_minute(results: Sequence[dict[str, Any]]) -> float:
        return 60 * sum(r["episodes"] for r in results) / sum(r["seconds"] for r in results)

    ratio = per_minute(ours) / per_minute(theirs)
    both = f"{per_minute(ours):.1f} / {per_minute(theirs):.1f}"
    rows.append(["**ratio**", "", "", "", f"{both} = **{ratio:.1f}x**", "", ""])
    mean = lambda f: sum(map(f, scripts)) / len(scripts)  # noqa: E731
    return Table(
        title=f"B: search episodes, {questions} questions x 4 samples",
        text=(
            "SmolLM2-135M, real weights, f32. Three turns with three real passages each, then an "
            f"answer: {mean(lambda s: s.sampled):.0f} sampled tokens and "
            f"{mean(lambda s: s.context):.0f} tokens of context on average, turn lengths and "
            f"queries from the released transcripts. Ours decodes {B_ROWS} rows at a time; the "
            "loop plays batches of 16, what is best for it here, one half before and one after."
        ),
        header=[
            "side",
            "machine",
            "episodes",
            "seconds",
            "episodes per minute",
            "prefilled per context token (padded / not)",
            "seconds all rows waited",
        ],
        rows=rows,
    )


def workload_c(scratch: Path, transcripts: work.Transcripts, rounds: int) -> Table:
    """Ragged turns and a slow retriever: how full the rows are."""
    folder = work.write_small_qwen2(scratch / "ragged")
    model, params = load(folder)
    tokenizer = Tokenizer.load(
        HERE.parent / "configs" / "models" / "tiny_base", vocab_size=model.vocab_size
    )
    scripts = work.ragged_episodes(tokenizer, transcripts)
    context = max(script.context for script in scripts) + 1
    engines = [
        make_engine(model, params, EngineConfig(rows=r, chunk=c, context=context, page=128))
        for r, c in C_SHAPES
    ]
    rows = []
    for engine in engines * rounds:
        c = calibrate(width=256, hidden=704)
        r = run_scripts(engine, scripts, retrieval_seconds=C_SECONDS)
        shape = engine.config
        chunks = r["row_steps"] / shape.rows / shape.chunk
        rows.append(
            [
                machine(c),
                f"{shape.rows} / {engine.plan.slots}",
                f"{r['seconds'] / chunks * 1000:.0f}",
                f"{r['seconds']:.0f}",
                f"{r['full_tokens'] / r['full_row_steps']:.3f}",
                f"{r['tokens'] / r['row_steps']:.3f}",
                f"{r['drain_tokens']:,}",
                f"{r['drain_tokens'] / r['drain_row_steps']:.3f}",
                f"{r['retrieval_wait_seconds'] / r['seconds']:.1%}",
                ratios(r),
            ]
        )
    return Table(
        title=f"C: ragged turns, searches of {C_SECONDS * 1000:.0f} ms",
        text=(
            f"{len(scripts)} episodes of the model of A, one to four searches each; turn lengths "
            f"log-normal, median {work.C_MEDIAN}, 99th percentile {work.C_PERCENTILE_99}, cut at "
            f"{work.C_LONGEST}. A row-step is one row in one decode step, parked and empty rows "
            "included; the queue is empty when the last episode has been started, what follows is "
            "the drain. The milliseconds are of a chunk with the documents written beside it."
        ),
        header=[
            "machine",
            "rows / slots",
            "ms per chunk",
            "seconds",
            "tokens per row-step until the queue is empty",
            "all in all",
            "tokens of the drain",
            "per row-step in it",
            "time all rows waited",
            "prefilled per context token (padded / not)",
        ],
        rows=rows,
    )


def step_floor(rounds: int) -> Table:
    """A decode step of 16 rows against what the machine could do."""
    model, params = load(smollm2())
    engine = make_engine(model, params, EngineConfig(rows=16, chunk=16, context=1536, page=128))
    count = engine.plan.weight_bytes // 4
    flops = 2 * 16 * count
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 4
    rows = []
    for live in [64, 1024] * rounds:
        c = calibrate(rows=16)
        seconds = step_seconds(engine, live)
        weights = c.floor_seconds(4 * count, flops)
        kv = 16 * (live + 24) * per_token / c.bandwidth / 1e9
        parts = (
            flops / c.skinny_streamed / 1e9,
            attention_seconds(engine, live),
            sampling_seconds(engine),
        )
        rows.append(
            [str(live), f"{c.bandwidth:.0f} GB/s, {c.skinny:.0f} GFLOP/s"]
            + [f"{x * 1000:.0f}" for x in (weights, kv, seconds)]
            + [f"{(weights + kv) / seconds:.0%}"]
            + [f"{x * 1000:.0f}" for x in (*parts, seconds - sum(parts))]
        )
    return Table(
        title="A decode step of SmolLM2-135M at 16 rows",
        text=(
            "Floor: the larger of weight bytes over bandwidth and FLOPs over the rate of matmuls "
            "of 16 rows whose two matrices stay in the caches; and the bytes of live KV over "
            "bandwidth. Then the step's parts, each measured by itself: as many FLOPs through "
            "ever new matrices of the same shapes, as a model's are (`matmuls`); appending and "
            "attending in all layers; drawing the tokens; and what is left: norms, rotations and "
            "what passes between operations. Milliseconds:"
        ),
        header=[
            "live tokens a row",
            "machine",
            "floor: weights",
            "floor: KV",
            "step",
            "floor / step",
            "matmuls",
            "attention",
            "sampling",
            "the rest",
        ],
        rows=rows,
    )


def slices(tpu_python: str) -> str:
    """What the programs of `stage2` take on the slices of TPUs, in compile_check's own words."""
    script = HERE.parent / "tpu_scripts" / "compile_check.py"
    parts = []
    for arguments in SLICES:
        command = [tpu_python, str(script), "--config", "stage2", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
        shown = " ".join(("compile_check.py --config stage2", *arguments))
        parts.append(f"`{shown}`\n\n{done.stdout}")
    return "## TPU slices, compiled ahead of time\n\n" + "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tunix_python", help="a Python that has google-tunix")
    parser.add_argument("--tpu_python", help="a Python that has requirements-tpu.txt")
    parser.add_argument("--data", type=Path, default=work.DATA, help="the released transcripts")
    parser.add_argument("--only", nargs="+", choices=["A", "C", "step", "slices", "B"])
    parser.add_argument("--questions", type=int, default=32, help="of workload B")
    parser.add_argument("--rounds", type=int, default=5, help="of the shorter workloads")
    parser.add_argument("--out", type=Path, help="rollout.md beside this file, if all is measured")
    args = parser.parse_args()
    whole = args.tunix_python and args.tpu_python and not args.only
    out = args.out or (HERE / "rollout.md" if whole else None)
    chosen = args.only or ["A", "C", "step", *["slices"] * bool(args.tpu_python), "B"]
    parts = [heading("Rollouts", __file__)]
    try:
        with tempfile.TemporaryDirectory() as name:
            scratch, short = Path(name), max(1, args.rounds // 2)
            if {"B", "C"} & set(chosen):
                transcripts = work.Transcripts.read(args.data)
            jobs: dict[str, Callable[[], Table | str]] = {
                "A": lambda: workload_a(scratch, args.tunix_python, args.rounds),
                "B": lambda: workload_b(scratch, transcripts, args.questions),
                "C": lambda: workload_c(scratch, transcripts, short),
                "step": lambda: step_floor(short),
                "slices": lambda: slices(args.tpu_python or sys.executable),
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
