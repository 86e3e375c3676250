"""Evaluates a policy on the held-out questions, greedily.

    python tpu_scripts/evaluate.py --run_dir RUN                     a run's export
    python tpu_scripts/evaluate.py --config NAME --checkpoint MODEL  any checkpoint, or hub id

Prints a table and writes eval_MODE.json (figures) and eval_MODE.jsonl (every trajectory) into
RUN, or into --out. Other modes than `search` are controls: forced (every response begins with a
query), banned (the query tag cannot be written; the one turn has the tokens of all),
wrong_passages (searches bring passages about something else), first_only (only the first search is
answered).
"""

import argparse
import json

import launch

MODES = ("search", "forced", "banned", "wrong_passages", "first_only")


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    config, checkpoint = launch.choose_policy(args)
    from etils import epath

    from r1s_jax.data.floors import floors
    from r1s_jax.models import hf
    from r1s_jax.rl.rewards import episode_metrics
    from r1s_jax.run.evaluate import evaluate
    from r1s_jax.run.metrics import trajectory_row, write_text_atomic
    from r1s_jax.run.progress import Progress
    from r1s_jax.run.report import evaluation_report
    from r1s_jax.run.rundir import write_json_atomic
    from r1s_jax.run.setup import build_parts

    out = epath.Path(args.out or args.run_dir or f"runs/eval_{config.name}")
    if out.exists() and not out.is_dir():
        raise launch.UserError(f"--out {out}: is a file, must be a folder")
    with Progress() as progress:
        parts = build_parts(config.value, checkpoint, training=False)
        progress.note(f"engine: {parts.engine.plan}")
        params = hf.load_params(parts.checkpoint, parts.model, parts.mesh)
        parts.engine.set_weights(params, 0)
        known, results = floors(parts.eval_questions), {}
        for mode in MODES if args.mode == "all" else (args.mode,):
            progress.note(f"{len(parts.eval_questions)} questions, {mode}")
            results[mode], trajectories = evaluate(parts, config.value, mode)
            out.mkdir(parents=True, exist_ok=True)
            about = {"config": config.name, "checkpoint": str(parts.checkpoint), "mode": mode}
            about["seed"] = config.value.seed
            rows = [{**trajectory_row(t, {}), "figures": episode_metrics(t)} for t in trajectories]
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text_atomic(out / f"eval_{mode}.jsonl", "".join(lines))
            figures = {"floors": known, "results": results[mode]}
            write_json_atomic(out / f"eval_{mode}.json", {**about, **figures})
    evaluation_report(results, known)
    print(f"figures and trajectories: {out}")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="folder or hub id, instead of the export or start"
    )
    parser.add_argument("--mode", choices=(*MODES, "all"), default="search")
    parser.add_argument("--out", metavar="DIR", help="where to write; RUN if not given")


if __name__ == "__main__":
    launch.run_main(main)
