"""Trains a policy: python tpu_scripts/train.py --config tiny

Starting the same command again resumes. Exit codes: 0 finished, 2 a mistake in the input,
75 interrupted and saved (start again).
"""

import launch


def main() -> int:
    args = launch.parse_args(__doc__)
    config = launch.load_config(args.config, args.gin)
    from r1s_jax.run.rundir import open_run_dir
    from r1s_jax.run.setup import check_inputs

    check_inputs(config.value)  # before anything is written or compiled
    from r1s_jax.run.train import train

    run_dir = open_run_dir(args.run_dir or f"runs/{config.name}", config.text)
    return train(config.value, run_dir)


if __name__ == "__main__":
    launch.run_main(main)
