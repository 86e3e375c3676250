"""Learning curves of the algorithms on the bundled world: python benchmarks/algorithms.py

Both stages of `tiny` by each algorithm and seed, greedy evaluation on all held-out questions every
four steps; then `stable` for five times the steps. Interrupted, the same command goes on: runs
resume where they stopped, finished ones are not repeated. Writes benchmarks/algorithms.md and the
picture beside it, which needs matplotlib (pip install matplotlib). Some three hours on two cores,
each of which plays a run of its own (--jobs).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from r1s_jax.run.metrics import read_rows  # noqa: E402

ALGORITHMS = ("faithful", "stable", "grpo", "dapo", "gspo")
STAGE1, STEPS, EVERY = 4, 28, 4  # steps of each stage; an evaluation every so many
LONG_STEPS = 5 * (STAGE1 + STEPS) - STAGE1  # of stage 2
TRY_AGAIN = 75
DAPO_LENGTHS = (
    "shaping.ShapingConfig.overlong_max = 160",
    "shaping.ShapingConfig.overlong_cache = 64",
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    algorithm: str
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        long = "" if self.steps == STEPS else f"-{self.steps}"
        return f"{self.algorithm}{long}-seed{self.seed}"

    def play(self, runs: Path, cores: str) -> None:
        """Runs it, or what is left of it, in a process of its own on the given cores."""
        folder = runs / self.name
        if (folder / "summary.json").exists():
            return
        command = [sys.executable, "tpu_scripts/train.py", "--config", "tiny"]
        command += ["--run_dir", os.path.relpath(folder, ROOT)]
        command += ["--preset", f"algorithms/{self.algorithm}"]
        for binding in (
            f"run.RunConfig.seed = {self.seed}",
            f"stage2/run.StageConfig.steps = {self.steps}",
            f"run.EvaluationConfig.every = {EVERY}",
            "run.EvaluationConfig.controls = False",
            # Lengths of this world's episodes; only dapo looks at them.
            *DAPO_LENGTHS * (self.algorithm == "dapo"),
        ):
            command += ["--gin", binding]
        print(f"{self.name}: {' '.join(command)}", flush=True)
        with (runs / f"{self.name}.log").open("a") as log:
            code = TRY_AGAIN
            while code == TRY_AGAIN:
                code = subprocess.run(
                    ["taskset", "-c", cores, *command], cwd=ROOT, stdout=log, stderr=log
                ).returncode
        if code:
            raise SystemExit(f"{self.name}: exit code {code}, see {log.name}")

    def curve(self, runs: Path) -> dict[str, list[float]]:
        """Held-out figures by step, both stages; step 0 is the base."""
        rows = read_rows(runs / self.name / "metrics.jsonl")
        kept = [r for r in rows if r["phase"] == "eval"]
        names = ("step", "em", "retrieval_rate", "format_rate", "searches_mean")
        return {name: [float(r[name]) for r in kept] for name in names}

    def trained(self, runs: Path, name: str) -> list[float]:
        """A figure of the training steps of stage 2."""
        rows = read_rows(runs / self.name / "metrics.jsonl")
        kept = [r for r in rows if r["phase"] == "train" and r["stage"] == "stage2"]
        return [float("nan") if r[name] is None else float(r[name]) for r in kept]


def play_all(jobs: list[Job], runs: Path, workers: int) -> None:
    """All jobs, `workers` at a time, each on its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [",".join(map(str, cores[i::workers])) for i in range(workers)]
    free = shares.copy()

    def one(job: Job) -> None:
        share = free.pop()
        try:
            job.play(runs, share)
        finally:
            free.append(share)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(one, job) for job in jobs]:
            done.result()


def picture(runs: Path, seeds: list[int], long: list[Job], path: Path) -> None:
    """Held-out EM and search rate by step: mean of the seeds, their range as a band."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "r1s_jax"  # the same file from the same figures
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True)
    for algorithm in ALGORITHMS:
        curves = [Job(algorithm, seed).curve(runs) for seed in seeds]
        steps = curves[0]["step"]
        for ax, name in zip(axes, ("em", "retrieval_rate"), strict=False):
            values = np.array([c[name] for c in curves])
            (line,) = ax.plot(steps, values.mean(axis=0), label=algorithm)
            low, high = values.min(axis=0), values.max(axis=0)
            ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    for job in long:
        curve = job.curve(runs)
        axes[2].plot(curve["step"], curve["em"], label=f"EM, seed {job.seed}")
        axes[2].plot(curve["step"], curve["retrieval_rate"], ls=":", label="search rate")
    titles = ("held-out EM", "held-out search rate", f"stable, {STAGE1} + {LONG_STEPS} steps")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="step", ylim=(0, 1.02))
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def collapse(job: Job, runs: Path) -> dict[str, float]:
    """Of a long run's stage 2: the largest fall of held-out EM below its best until then."""
    curve = job.curve(runs)
    start = curve["step"].index(STAGE1)  # where stage 1 ended
    em, rate = np.array(curve["em"])[start:], np.array(curve["retrieval_rate"])[start:]
    falls = np.maximum.accumulate(em) - em
    return {"best": em.max(), "last": em[-1], "fall": falls.max(), "rate": rate.min()}


def report(runs: Path, seeds: list[int], long: list[Job]) -> str:
    lines = [
        "# Algorithms on the bundled world\n",
        "Command: `python benchmarks/algorithms.py`; machine: "
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}. "
        f"Both stages of `tiny` ({STAGE1} and {STEPS} steps) by each preset of configs/algorithms; "
        "greedy figures on all 1,254 held-out questions. Bands: the range of "
        f"{len(seeds)} seeds.\n",
        "![curves](algorithms.svg)\n",
        "| algorithm | EM at the end | best EM | search rate | format | searches | "
        "entropy at the end | refills a step |",
        f"|---|{'---:|' * 7}",
    ]
    for algorithm in ALGORITHMS:
        jobs = [Job(algorithm, seed) for seed in seeds]
        curves = [job.curve(runs) for job in jobs]
        ends = ", ".join(f"{c['em'][-1]:.3f}" for c in curves)
        mean = np.mean([c["em"][-1] for c in curves])
        cells = [f"**{mean:.3f}** ({ends})", f"{np.mean([max(c['em']) for c in curves]):.3f}"]
        for name in ("retrieval_rate", "format_rate", "searches_mean"):
            cells.append(f"{np.mean([c[name][-1] for c in curves]):.3f}")
        cells.append(f"{np.nanmean([job.trained(runs, 'entropy')[-1] for job in jobs]):.3f}")
        cells.append(f"{np.mean([np.mean(job.trained(runs, 'refills')) for job in jobs]):.2f}")
        lines.append(f"| {algorithm} | {' | '.join(cells)} |")
    lines += [
        f"\n## `stable` for {STAGE1} + {LONG_STEPS} steps\n",
        "| seed | best EM | last EM | largest fall below the best so far | least search rate |",
        "|---|---:|---:|---:|---:|",
    ]
    for job in long:
        found = collapse(job, runs)
        lines.append(
            f"| {job.seed} | {found['best']:.3f} | {found['last']:.3f} | {found['fall']:.3f} | "
            f"{found['rate']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--long_seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench_algorithms")
    args = parser.parse_args()
    runs = args.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    long = [Job("stable", seed, LONG_STEPS) for seed in args.long_seeds]
    jobs = [*long, *(Job(a, s) for s in args.seeds for a in ALGORITHMS)]
    play_all(jobs, runs, args.jobs)
    folder = ROOT / "benchmarks"
    picture(runs, args.seeds, long, folder / "algorithms.svg")
    text = report(runs, args.seeds, long)
    (folder / "algorithms.md").write_text(text)
    print(text)
    print(json.dumps({job.name: collapse(job, runs) for job in long}, default=float))


if __name__ == "__main__":
    main()
