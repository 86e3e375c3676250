"""Exports a run's latest checkpoint for transformers: python tpu_scripts/export_hf.py --run_dir RUN

Writes RUN/hf, or the folder given with --out; an earlier export is replaced, anything else is
left alone. Finished runs have exported already. With --push OWNER/NAME the folder is then uploaded
to the Hugging Face hub, into a private repository that its owner can publish there.
"""

import argparse
import pathlib

import launch
from r1s_jax.types import UserError


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    if args.run_dir is None or args.config is not None:
        raise UserError("give --run_dir RUN, and no --config: a run knows its own (see --help)")
    from r1s_jax.models import hub

    if args.push is not None:
        hub.check_push(args.push)
    config = launch.load_run_config(args.run_dir, args.gin)
    from r1s_jax.run.export import export_run

    kind = "adapters" if args.adapters else "hf"
    out = pathlib.Path(args.out or pathlib.Path(args.run_dir) / kind).expanduser()
    step, folder = export_run(config.value, args.run_dir, out, adapters=args.adapters)
    print(f"step {step} of {args.run_dir} is in {folder}", flush=True)
    if args.push is not None:
        name = pathlib.PurePath(args.run_dir).name
        print(f"pushed to {hub.push(folder, args.push, message=f'{name}: step {step}')}")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", help="where to write; RUN/hf if not given")
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="of a run that trained low-rank adapters: these alone, for PEFT, in RUN/adapters; "
        "without it they are merged into the policy",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="then upload it to this repository of the hub; a new one is private until you make it "
        "public there; needs HF_TOKEN or `hf auth login`",
    )


if __name__ == "__main__":
    launch.run_main(main)
