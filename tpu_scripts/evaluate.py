"""Evaluates on held-out questions, greedily: a policy, an endpoint, or a file of answers.

    python tpu_scripts/evaluate.py --run_dir RUN                       a run's export
    python tpu_scripts/evaluate.py --config NAME --checkpoint MODEL    any checkpoint, or hub id
    python tpu_scripts/evaluate.py --config NAME --endpoint URL --model MODEL    OpenAI-compatible
    python tpu_scripts/evaluate.py --score FILE [--against FILE]       answers, without a model

Prints tables and writes eval_MODE.jsonl (every answer), eval_MODE.json (figures) and eval.md (a
table beside the published one) into RUN, or into --out. Modes: search; the baselines closed_book
and standard_rag (one retrieval with the question); and controls of a policy: forced (a query comes
first), banned (no query can be written; its one turn has the tokens of all), wrong_passages (about
something else), first_only (further searches are not answered). With --judge and --judge_model a
model gives the verdicts of ACC_L, beside --score into runs/score_FOLDER_FILE. Key: OPENAI_API_KEY.
"""

import argparse

import launch

OPEN = ("search", "closed_book", "standard_rag")  # what an endpoint can play, too
MODES = (*OPEN, "forced", "banned", "wrong_passages", "first_only")
ALONE = {  # what would have no effect beside it
    "score": ("config", "run_dir", "checkpoint", "endpoint", "model", "api", "mode"),
    "endpoint": ("run_dir", "checkpoint"),
    "against": ("out", "judge"),  # each file is judged by itself
}
NEEDS = {"against": "score", "model": "endpoint", "api": "endpoint"}


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    for option, others in ALONE.items():
        for other in others:
            if getattr(args, option) and getattr(args, other):
                raise launch.UserError(f"--{option} goes without --{other}")
    for option, other in NEEDS.items():
        if getattr(args, option) and not getattr(args, other):
            raise launch.UserError(f"--{option}: --{other} is missing")
    from r1s_jax.run import score

    judge = score.judge(args.judge, args.judge_model, args.judge_price, args.judge_tokens)
    if args.score:
        if set(args.gin) - {launch.SKIP_BAD}:
            raise launch.UserError("--score goes without --gin and --preset")
        how = {"against": args.against, "out": args.out, "skip_bad": launch.SKIP_BAD in args.gin}
        score.score_answers(args.score, judge=judge, **how)
        return
    modes = tuple(dict.fromkeys(args.mode or ["search"]))
    if "all" in modes:
        modes = OPEN if args.endpoint else MODES
    if args.endpoint:
        chat = score.endpoint(args.endpoint, args.model, args.api or "chat")
        config = launch.load_config(args.config, args.gin)
        out = args.out or f"runs/{config.name}_{chat.model.replace('/', '-')}"
        score.score_endpoint(config.value, chat, modes, name=config.name, out=out, judge=judge)
        return
    config, checkpoint = launch.choose_policy(args)
    out = args.out or args.run_dir or f"runs/eval_{config.name.removeprefix('eval_')}"
    score.score_policy(config.value, checkpoint, modes, name=config.name, out=out, judge=judge)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="folder or hub id, instead of the export or start"
    )
    parser.add_argument("--mode", choices=(*MODES, "all"), nargs="+", help="one or more; search")
    parser.add_argument("--out", metavar="DIR", help="where to write; RUN if not given")
    parser.add_argument("--score", metavar="FILE", help="answers in R1-Searcher's released form")
    parser.add_argument("--against", metavar="FILE", help="other answers to the same questions")
    parser.add_argument("--endpoint", metavar="URL", help="ends before /chat/completions")
    parser.add_argument("--model", help="the endpoint's name of the model")
    parser.add_argument("--api", choices=("chat", "completions"), help="chat if not given")
    parser.add_argument("--judge", metavar="URL", help="endpoint of the judge")
    parser.add_argument("--judge_model", metavar="MODEL")
    parser.add_argument("--judge_price", type=float, nargs=2, metavar=("IN", "OUT"), default=(0, 0))
    parser.add_argument("--judge_tokens", type=int, default=1_000_000, help="refuses above it")


if __name__ == "__main__":
    launch.run_main(main)
