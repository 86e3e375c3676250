"""Makes the bundled base policy anew: python tpu_scripts/pretrain_tiny.py

A byte-level BPE tokenizer and a small Qwen2 decoder, trained with plain next-token loss on
transcripts about the atlas' `base` countries, in which searching is a minority habit. Takes about
70 minutes on two idle cores (4 on one H100, where the bundled one was made) and writes a Hugging
Face folder (configs/models/tiny_base, or --out), then prints what the base does by itself: how
often it searches in samples over the RL questions, its exact match on the held-out questions, and
the same when it is forced to search.
"""

import argparse
import pathlib

import launch


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    if args.run_dir is not None:
        raise launch.UserError("--run_dir: this script writes no run; use --out")
    if args.steps is not None and args.steps < 1:
        raise launch.UserError(f"--steps {args.steps}: must be at least 1")
    config = launch.load_config(args.config or "tiny", args.gin).value
    from r1s_jax.models import hf
    from r1s_jax.pretrain.loop import PretrainConfig
    from r1s_jax.pretrain.report import describe, habits, make_base
    from r1s_jax.run.setup import build_parts

    out = pathlib.Path(args.out).expanduser()
    if not args.habits_only:
        defaults = PretrainConfig()
        steps = args.steps or defaults.steps
        warmup = min(defaults.warmup_steps, steps // 2)
        settings = PretrainConfig(steps=steps, warmup_steps=warmup, seed=args.seed)
        make_base(settings, config.rollout.documents, out, lambda text: print(text, flush=True))
        print(f"base policy: {out}", flush=True)
    parts = build_parts(config, out)
    parts.engine.set_weights(hf.load_params(parts.checkpoint, parts.model, parts.mesh), 0)
    print(describe(habits(parts, config)))


def _add(parser: argparse.ArgumentParser) -> None:
    default = launch.ROOT / "configs" / "models" / "tiny_base"
    parser.add_argument("--out", metavar="FOLDER", default=str(default), help="where to write")
    parser.add_argument("--steps", type=int, help="optimizer steps; the recipe's if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--habits_only", action="store_true", help="only measure what is in --out")


if __name__ == "__main__":
    launch.run_main(main)
