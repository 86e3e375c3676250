"""Grades the training questions by how many rollouts a reference policy needs to be right once.

    python tpu_scripts/grade_difficulty.py --config NAME                     the config's own start
    python tpu_scripts/grade_difficulty.py --config NAME --checkpoint MODEL  a folder or hub id
    python tpu_scripts/grade_difficulty.py --run_dir RUN                     a run's export

Plays with the config's sampling and rollout settings. Easy, medium and hard are the paper's: fewer
than 10 rollouts, 10 to 20, more. Writes one JSON line per question (--keep medium,hard: of these
only), which training takes as it is: --gin 'run.WorldConfig.train_questions = "FILE"'.
Every rollout is noted in STEM.rollouts.jsonl beside FILE: the same command goes on after a kill,
and another --keep, other thresholds or fewer --rollouts play nothing again. More --rollouts (a
greater --hard_above asks for them) play only what is missing, and once more what a question had of
the wave where it was cut off: waves end at 1, 2, 4, 8, 16, 32, ... rollouts.
"""

import argparse

import launch


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    config, checkpoint = launch.choose_policy(args)
    from etils import epath

    from r1s_jax.data.difficulty import Thresholds
    from r1s_jax.run.grade import GradeConfig, grade, grade_report
    from r1s_jax.run.progress import Progress

    grading = GradeConfig(
        rollouts=max(20, args.hard_above) if args.rollouts is None else args.rollouts,
        measure=args.measure,
        thresholds=Thresholds(easy_below=args.easy_below, hard_above=args.hard_above),
        keep=tuple(args.keep.split(",")),
    )
    default = f"{args.run_dir}/graded.jsonl" if args.run_dir else f"runs/graded_{args.config}.jsonl"
    out = epath.Path(args.out or default)
    if out.is_dir():
        raise launch.UserError(f"--out {out}: is a folder, must be a file")
    with Progress() as progress:
        graded = grade(config.value, checkpoint, out, grading, progress)
    grade_report(graded, grading.thresholds)
    print(f"{args.keep.replace(',', ', ')} questions: {out}")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="folder or hub id, instead of the export or start"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="runs/graded_NAME.jsonl or RUN/graded.jsonl if not given"
    )
    parser.add_argument(
        "--rollouts", metavar="K", type=int, help="of a question at most: 20, or hard_above if more"
    )
    parser.add_argument(
        "--measure", choices=("acc_r", "em"), default="acc_r", help="right: cover-EM or exact match"
    )
    parser.add_argument("--easy_below", metavar="N", type=int, default=10)
    parser.add_argument("--hard_above", metavar="N", type=int, default=20)
    parser.add_argument(
        "--keep", metavar="NAMES", default="easy,medium,hard", help="what FILE is to hold"
    )


if __name__ == "__main__":
    launch.run_main(main)
