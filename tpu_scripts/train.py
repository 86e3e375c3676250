"""Trains a policy: python tpu_scripts/train.py --config tiny

Starting the same command again resumes. On several hosts the same command is given on each of
them, with a run directory that all of them share; on a TPU pod that is all, elsewhere each is told
which one it is: --host 0/2 --coordinator 10.0.0.2:8476 on the first of two, --host 1/2 and the
same coordinator on the second.

Exit codes: 0 finished, 2 a mistake in the input, 75 interrupted and saved (start again), 69 a host
was lost (start again on all hosts: the run goes on from its last checkpoint).
"""

import launch
from r1s_jax.run import supervise


def main() -> int:
    args = launch.parse_args(__doc__, add=supervise.add_options)
    run_dir = args.run_dir or f"runs/{args.config}"

    def train() -> int:
        return _train(args.config, args.gin, run_dir)

    child = supervise.child_of()
    if child is not None:
        from r1s_jax.run import hosts

        return hosts.work(child, train, launch.explain)
    host = supervise.this_host(args.host, args.coordinator)
    return train() if host is None else supervise.supervise(host, run_dir)


def _train(name: str | None, bindings: list[str], run_dir: str) -> int:
    config = launch.load_config(name, bindings)
    from r1s_jax.run import hosts, train
    from r1s_jax.run.rundir import config_bindings, open_run_dir
    from r1s_jax.run.setup import check_inputs

    hosts.require_same({"--run_dir": run_dir, **config_bindings(config.text)})
    check_inputs(config.value)  # before anything is written or compiled
    return train.train(config.value, open_run_dir(run_dir, config.text))


if __name__ == "__main__":
    launch.run_main(main)
