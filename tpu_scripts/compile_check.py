"""Compiles a run's programs for a TPU slice on a machine without one, and prints what they take.

    python tpu_scripts/compile_check.py --config stage2 --topology v5e:8x8
    python tpu_scripts/compile_check.py --config stage2 --topology v5p:4x4x4 --model qwen2_5_32b
    python tpu_scripts/compile_check.py --config stage2 --topology v6e

A slice that has a file in configs/meshes is checked with it, unless a mesh is given; a chip alone
asks for its smallest slice with room for the run. Printed are all programs, what is alive together
in each phase, and a step's time by the roofline. Figures are per chip. Takes minutes. Needs libtpu:
pip install -r requirements-tpu.txt. Exit codes: 0 all fits, 1 something does not, 2 bad input.
"""

import argparse
import math
import os
import re

import launch

# There is no TPU here: libtpu is not to look for one, nor to mind others that do the same.
ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # else a second run would be done in no time
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: what is compiled for is given by name
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def main() -> int:
    args = launch.parse_args(__doc__, add=_add)
    if args.topology is None:
        raise launch.UserError("--topology CHIP:SLICE is missing, such as v5p:4x4x4 (see --help)")
    own_mesh = any(re.search("MeshConfig[.]|meshes/", binding) for binding in args.gin)
    preset = None if own_mesh else mesh_preset(args.topology)
    if preset:
        print(f"With --preset {preset}.")
        args.gin.insert(0, f'include "{preset}.gin"')
    config = launch.load_config(args.config, args.gin)
    from r1s_jax.aot.check import check

    return check(
        config.value,
        topology=args.topology,
        model=args.model,
        live_tokens=args.live_tokens,
        own_mesh=own_mesh,
        embedder=not args.no_embedder,
    )


def mesh_preset(topology: str) -> str | None:
    """The file for a slice in configs/meshes, by chip and number of chips, if there is one."""
    chip, _, size = topology.partition(":")
    chips = math.prod(int(n) for n in re.findall(r"\d+", size))
    name = f"meshes/{chip}_{chips}"
    return name if size and (launch.CONFIGS / f"{name}.gin").is_file() else None


def _add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", metavar="CHIP:SLICE", help="such as v5e:8x8; or a chip alone, v5e")
    either = "a folder with a config.json, or one of configs/models"
    add("--model", metavar="MODEL", help=f"instead of the policy: {either}")
    live = "mean length of the rows that decode; as in the released transcripts if not given"
    add("--live_tokens", metavar="N", type=int, help=live)
    add("--no_embedder", action="store_true", help="leave out the embedder of passages")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    launch.run_main(main)
