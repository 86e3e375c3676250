"""Exports a run's latest checkpoint for transformers: python tpu_scripts/export_hf.py --run_dir RUN

Writes RUN/hf, or the folder given with --out; an earlier export is replaced, anything else is
left alone. Finished runs have exported already.
"""

import argparse
import pathlib

import launch
from r1s_jax.types import UserError


def main() -> None:
    args = launch.parse_args(__doc__, add=_add)
    if args.run_dir is None or args.config is not None:
        raise UserError("give --run_dir RUN, and no --config: a run knows its own (see --help)")
    config = launch.load_run_config(args.run_dir, args.gin)
    from r1s_jax.run.export import export_run

    out = pathlib.Path(args.out or pathlib.Path(args.run_dir) / "hf").expanduser()
    step, folder = export_run(config.value, args.run_dir, out)
    print(f"step {step} of {args.run_dir} is in {folder}")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FOLDER", help="where to write; RUN/hf if not given")


if __name__ == "__main__":
    launch.run_main(main)
