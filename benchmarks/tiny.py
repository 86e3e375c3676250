"""Everything `benchmarks/tiny.md` claims, measured: python benchmarks/tiny.py [--seeds 0 1 2]

Per seed: stage 1, stage 2, and stage 2 with permuted rewards (the control). For the first seed
also the main job as a user starts it, timed; the same once more, killed with SIGKILL in the middle
of a step and resumed; and its export in transformers. Runs that are finished are not repeated, so
the command can be interrupted; figures come from their summary.json. Two hours on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tiny_export  # noqa: E402

from r1s_jax.run.metrics import identical, read_rows  # noqa: E402

FIGURES = {
    "em": "EM",
    "retrieval_rate": "search rate",
    "format_rate": "format",
    "searches_mean": "queries",
    "em_given_search": "EM given search",
    "gold_found": "gold found",
    "em_one_hop": "EM 1 hop",
    "em_two_hop": "EM 2 hops",
    "answered_rate": "answer rate",
}


# The kill comes three seconds after this row of metrics.jsonl, two steps after a checkpoint.
KILL_AT = 19


def train(
    config: str,
    run_dir: Path,
    seed: int,
    start: Path | None = None,
    *,
    kill: bool = False,
    cold: bool = False,
) -> dict[str, float]:
    """Runs (or finishes) one training in a process of its own; returns its cost.

    With `kill` the process gets a SIGKILL on its way and is started again; `cold` means a cache
    folder of its own, so that the world is made and everything compiled.
    """
    cost = run_dir.with_suffix(".cost.json")
    if cost.exists():
        return json.loads(cost.read_text())
    command = [sys.executable, "tpu_scripts/train.py", "--config", config]
    command += [
        "--run_dir",
        os.path.relpath(run_dir, ROOT),
        "--gin",
        f"run.RunConfig.seed = {seed}",
    ]
    if start is not None:
        command += ["--gin", f'run.PolicyConfig.checkpoint = "{start}"']
    print(" ".join(command), flush=True)
    started = time.perf_counter()
    if kill:
        with subprocess.Popen(command, cwd=ROOT) as process:
            file = run_dir / "metrics.jsonl"
            while not file.exists() or file.read_text().count("\n") < KILL_AT:
                if process.poll() is not None:
                    raise SystemExit(f"{run_dir}: ended before it could be killed")
                time.sleep(0.1)
            time.sleep(3)
            process.send_signal(signal.SIGKILL)
    with tempfile.TemporaryDirectory() as empty:
        cache = {"R1S_JAX_CACHE": empty} if cold else {}
        subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}, check=True)
    spent = {"seconds": time.perf_counter() - started}
    # Of all children so far: an upper bound, exact for the largest.
    spent["peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    cost.write_text(json.dumps(spent))
    return spent


def results(run_dir: Path) -> dict[str, dict[str, float]]:
    return json.loads((run_dir / "summary.json").read_text())["results"]


def same_weights(a: Path, b: Path) -> bool:
    file = Path("hf") / "model.safetensors"
    return (a / file).read_bytes() == (b / file).read_bytes()


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.machine()


def _verdict(same: bool) -> str:
    return "identical, bit for bit" if same else "DIFFER"


def table(rows: list[tuple[str, dict[str, float]]]) -> list[str]:
    lines = [f"| policy | {' | '.join(FIGURES.values())} |", f"| --- |{' ---: |' * len(FIGURES)}"]
    for name, figures in rows:
        cells = " | ".join(f"{figures[f]:.3f}" for f in FIGURES)
        lines.append(f"| {name} | {cells} |")
    return lines


def seed_section(runs: Path, seed: int) -> list[str]:
    """Trains one seed in two runs and the control; returns its part of the report."""
    folder = runs / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    first, second, permuted = (folder / n for n in ("stage1", "stage2", "permuted"))
    train("tiny_stage1", first, seed)
    train("tiny_stage2", second, seed, start=first / "hf")
    train("tiny_permuted", permuted, seed, start=first / "hf")
    one, two, control = results(first), results(second), results(permuted)
    sampled = next(r for r in read_rows(first / "metrics.jsonl") if r["phase"] == "train")
    rows = [
        ("base, in samples over training questions", sampled),
        ("base", one["base"]),
        ("base, forced to search", one["base/forced"]),
        ("after stage 1", one["stage1"]),
        ("after stage 2", two["stage2"]),
        ("final, search banned", two["final/banned"]),
        ("final, wrong passages", two["final/wrong_passages"]),
        ("final, first search only", two["final/first_only"]),
        ("stage 2 with permuted rewards", control["stage2"]),
    ]
    steps = [r for r in read_rows(second / "metrics.jsonl") if r["phase"] == "train"]
    gap = max(r["logprob_gap"] or 0.0 for r in steps)
    compiles = max(r["compiles"] for r in steps)
    return [
        f"\n## Seed {seed}\n",
        *table(rows),
        f"\nLargest `logprob_gap` {gap:.1e}; programs compiled after the start: {compiles:.0f}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_tiny")
    args = parser.parse_args()
    runs = args.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    seed = args.seeds[0]
    cost = train("tiny", runs / "main", seed, cold=True)
    sections = [line for s in args.seeds for line in seed_section(runs, s)]
    train("tiny", runs / "killed", seed, kill=True)
    floors = json.loads((runs / "main" / "summary.json").read_text())["floors"]
    differences = identical(runs / "main" / "metrics.jsonl", runs / "killed" / "metrics.jsonl")
    resumed = same_weights(runs / "main", runs / "killed")
    chained = same_weights(runs / "main", runs / f"seed{seed}" / "stage2")
    export = tiny_export.compare(runs / "main")
    report = [
        "# The tiny config, measured\n",
        f"Command: `python benchmarks/tiny.py --seeds {' '.join(map(str, args.seeds))}`; "
        f"machine: {os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, "
        f"jax {importlib.metadata.version('jax')}.",
        "All figures but those of samples: greedy, all 1,254 held-out questions of the atlas.\n",
        f"- main job (`train.py --config tiny`, seed {seed}, nothing cached): "
        f"{cost['seconds']:.0f} s, peak memory {cost['peak_gb']:.2f} GB",
        f"- floors: majority answer {floors['majority']:.3f}, character n-grams of the city's "
        f"name {floors['ngram']:.3f}",
        f"- the same seed again, killed with SIGKILL after row {KILL_AT} and resumed: "
        f"{len(differences)} differing figures in `metrics.jsonl`, weights {_verdict(resumed)}",
        f"- `tiny` and `tiny_stage1` followed by `tiny_stage2`: weights {_verdict(chained)}",
        f"- export in transformers (torch, f32), {tiny_export.COUNT} held-out episodes: logits "
        f"within {export['logits']:.1e}; {export['turns_alike']} of {export['turns']} turns and "
        f"{export['prompts_alike']} of {tiny_export.COUNT} prompts alike",
        *sections,
    ]
    (ROOT / "benchmarks" / "tiny.md").write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
