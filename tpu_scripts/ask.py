"""Asks a trained policy: python tpu_scripts/ask.py "What is the time zone of Kyoto?"

Thought, query, documents and answer appear as they come. The policy is the export of --run_dir
(runs/tiny if nothing is given), or that of --config NAME [--checkpoint MODEL]. It answers
greedily unless a --temperature is given.
"""

import argparse

import launch

STYLES = {"label": "dim", "query": "cyan", "documents": "dim", "invented": "red", "answer": "bold"}


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    if not args.question.strip():
        raise launch.UserError("the question is empty")
    if args.temperature < 0:
        raise launch.UserError(f"--temperature {args.temperature}: must be at least 0")
    config, checkpoint = launch.choose_policy(args, default_run="runs/tiny")
    from rich.console import Console
    from rich.text import Text

    from r1s_jax.models import hf
    from r1s_jax.run.ask import ask
    from r1s_jax.run.setup import build_parts
    from r1s_jax.types import StopReason

    parts = build_parts(config.value, checkpoint, training=False)
    parts.engine.set_weights(hf.load_params(parts.checkpoint, parts.model, parts.mesh), 0)
    console = Console(highlight=False, soft_wrap=True)

    def show(text: str, section: str) -> None:
        console.print(Text(text), style=STYLES.get(section), end="")

    episode = ask(
        parts, config.value, args.question, show, temperature=args.temperature, seed=args.seed
    )
    if episode.stop_reason != StopReason.ANSWER:
        reason = "" if episode.stop_reason is None else episode.stop_reason.value
        console.print(f"\n(no answer: {reason.replace('_', ' ')})")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question")
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="folder or hub id, instead of the export or start"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    launch.run_main(main)
